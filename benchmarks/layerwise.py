"""Every installed solver on captured layers of a real model: error, held-out error, seconds, side by side.

    python -m benchmarks.layerwise [--model smollm2-135m] [--blocks 0 12 29] [--patterns 50% 2:4 70%] [--json FILE]

Weights and inputs are the dense model's. Linears that read the same tensor share one Stats and its cache, as in a walk,
so a factorization is paid for once, by the first of them; every solver begins with an empty cache. Errors are relative,
||V x - W x||^2 / ||W x||^2, on the calibration tokens and on held-out tokens of other documents. Ratios are to
sparsegpt in the same run.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.captured import Group, cached, capture
from benchmarks.show import show
from benchmarks.solvers import from_recipe, from_text, installed, value
from sparsekit.maths import Pattern, parse
from sparsekit.system import hardware, session, versions, write_json

BASELINE = "sparsegpt"
COLUMNS = ["solver", "pattern", "error", "held out", "mean ratio", "ratio of means"]
COLUMNS += ["seconds", "seconds ratio", "sparsity"]


@torch.no_grad()
def measure(solver: Callable[..., Tensor], groups: Sequence[Group], pattern: Pattern) -> dict[str, dict[str, float]]:
    """Linear's name -> {error, held_out, seconds, zeros, parameters}."""
    torch.manual_seed(0)
    found = {}
    for group in groups:
        stats = group.fresh()
        for name, weight in group.weights.items():
            _wait()
            started = time.perf_counter()
            solved = solver(weight, stats, pattern)
            _wait()
            found[name] = {
                "seconds": time.perf_counter() - started,
                "error": stats.error(solved, weight),
                "held_out": group.held_out.error(solved, weight),
                "zeros": solved.numel() - int(solved.count_nonzero()),
                "parameters": solved.numel(),
            }
    return found


def summary(found: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over the linears, and their ratios to the baseline's; 0 / 0 counts as 1."""

    def over(key: str, of: dict[str, dict[str, float]] = found) -> list[float]:
        return [linear[key] for linear in of.values()]

    mine, theirs = over("held_out"), over("held_out", baseline)
    return {
        "error": mean(over("error")),
        "held_out": mean(mine),
        "mean_of_ratios": mean(_ratio(a, b) for a, b in zip(mine, theirs, strict=True)),
        "ratio_of_means": _ratio(mean(mine), mean(theirs)),
        "seconds": sum(over("seconds")),
        "ratio_of_seconds": sum(over("seconds")) / sum(over("seconds", baseline)),
        "sparsity": sum(over("zeros")) / sum(over("parameters")),
    }


def compare(
    solvers: dict[str, Callable[..., Tensor]], groups: Sequence[Group], patterns: Sequence[str]
) -> list[dict[str, Any]]:
    """A record for each pattern and solver.

    A solver that refuses a layer (ValueError) has a record with the reason under `failed`: one plugin's limit must not
    cost the others' figures.
    """
    records: list[dict[str, Any]] = []
    solvers = {BASELINE: from_text(BASELINE)} | solvers
    measure(solvers[BASELINE], groups[:1], parse(patterns[0]))  # the libraries' first call is not counted to anybody
    for text in patterns:
        pattern = parse(text)
        baseline: dict[str, dict[str, float]] = {}
        for name, solver in solvers.items():
            record: dict[str, Any] = {"solver": name, "pattern": str(pattern)}
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                try:
                    found = measure(solver, groups, pattern)
                    baseline = baseline or found  # the first of the solvers
                    record |= summary(found, baseline) | {"linears": found}
                except ValueError as error:
                    if name == BASELINE:
                        raise
                    record["failed"] = str(error)
            records.append(record | {"warnings": [str(each.message) for each in heard]})
            print(f"{pattern} {name}", file=sys.stderr, flush=True)
    return records


def cells(record: dict[str, Any]) -> list[str]:
    """One row of the table."""
    if "failed" in record:
        return [record["solver"], record["pattern"], "failed", *[""] * (len(COLUMNS) - 3)]
    return [
        record["solver"],
        record["pattern"],
        f"{record['error']:.5f}",
        f"{record['held_out']:.5f}",
        f"{record['mean_of_ratios']:.3f}",
        f"{record['ratio_of_means']:.3f}",
        f"{record['seconds']:.2f}",
        f"{record['ratio_of_seconds']:.2f}",
        f"{record['sparsity']:.2%}",
    ]


def _ratio(a: float, b: float) -> float:
    return a / b if b else (float("inf") if a else 1.0)


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.layerwise", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="whatever a recipe's `model` could name")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 12, 29], help="which, counted from 0")
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4", "70%"])
    parser.add_argument(
        "--solvers",
        nargs="+",
        help="names, as in wanda+refit (a chain) and alps:damping=0.2,iterations=12; without: all that are installed",
    )
    parser.add_argument("--recipes", nargs="+", default=[], help="their chains of solvers, each as a row")
    parser.add_argument("--text", default="python-docs", help="source, file or {source: jsonl, path: FILE, pack: true}")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=8, help="samples of other documents")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="keep the captured layers in this file (safetensors)")
    parser.add_argument("--json", type=Path, help="write every figure, those of each linear too")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, 1 if a solver failed, 2 for a mistake in what was given."""
    given = _arguments(argv)
    names = installed() if given.solvers is None else given.solvers
    try:
        solvers = {name: from_text(name) for name in names}
        solvers |= {Path(file).name: from_recipe(file) for file in given.recipes}
        settings = {
            "model": value(given.model),
            "text": value(given.text),
            "blocks": sorted(set(given.blocks)),
            **{key: getattr(given, key) for key in ("samples", "held_out", "length", "seed")},
        }
        with session():
            groups = cached(given.cache, settings) if given.cache else capture(settings, given.device)
        for text in given.patterns:
            for group in groups:
                parse(text).check(group.stats.width, next(iter(group.weights)))
        records = compare(solvers, [group.to(given.device) for group in groups], given.patterns)
    except ValueError as error:
        print(f"benchmarks.layerwise: {error}", file=sys.stderr)
        return 2
    blocks = ", ".join(map(str, settings["blocks"]))
    count = f"{given.samples} x {given.length} tokens, held out {given.held_out} x {given.length}"
    title = f"{given.model}, blocks {blocks}, {given.text}, {count}"
    show(COLUMNS, [cells(record) for record in records], title=title, markdown=given.markdown)
    for record in records:
        where = f"{record['solver']}, {record['pattern']}"
        if record["warnings"]:
            print(f"{where}: {len(record['warnings'])} warnings, the first: {record['warnings'][0]}", file=sys.stderr)
        if "failed" in record:
            print(f"{where} failed: {record['failed']}", file=sys.stderr)
    if given.json:
        whole = {"settings": settings, "hardware": hardware(), "versions": versions(), "records": records}
        write_json(given.json, whole)
    return 1 if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
