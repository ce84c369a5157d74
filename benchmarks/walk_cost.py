"""What a walk costs over the bare work it cannot avoid, side by side in one process.

    python -m benchmarks.walk_cost [--model smollm2-135m] [--samples 24] [--length 256] [--pattern 2:4] [--blocks N]

Bare work: two forward passes of every block over the same tokens, and, for a solver that needs them, the Gram products
of every group. For each solver
the whole walk (capture, solving, error of every linear, inputs of the next block, commits to disk) is timed between two
measurements of the bare work, and the ratio is to their mean, so that a machine that changes speed does not matter.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsekit.contracts import needs_gram
from sparsekit.data import calibration_tokens
from sparsekit.model import discover, first_inputs, load_plain
from sparsekit.recipe import load_recipe
from sparsekit.registry import load
from sparsekit.run import make_plan, run_stages
from sparsekit.system import Meter, hardware, session, versions


@torch.no_grad()
def bare_work(model: Any, tokens: torch.Tensor, batch: int, limit: int | None) -> dict[str, float]:
    """Seconds of two forward passes of the blocks, and of one Gram product for each group."""
    blocks = discover(model, tokens[:1, :8])
    chunks = list(first_inputs(model, blocks, tokens, batch))
    forward = gram = 0.0
    for block in blocks[:limit]:
        for _ in range(2):
            start = time.perf_counter()
            outputs = [block(chunk) for chunk in chunks]
            forward += time.perf_counter() - start
        inputs: dict[int, list[torch.Tensor]] = {}
        with block.watching(range(len(block.groups)), lambda g, x, to=inputs: to.setdefault(g, []).append(x)):
            for chunk in chunks:
                block(chunk)
        start = time.perf_counter()
        for seen in inputs.values():
            total = torch.zeros(seen[0].shape[-1], seen[0].shape[-1])
            for x in seen:
                flat = x.reshape(-1, x.shape[-1]).float()
                total.addmm_(flat.T, flat)
        gram += time.perf_counter() - start
        chunks = outputs
    return {"forward": forward, "gram": gram}


def walk(recipe: str, overrides: list[str], tokens: torch.Tensor, limit: int | None) -> dict[str, float]:
    """Seconds of a whole walk, and of its parts."""
    with tempfile.TemporaryDirectory() as folder, session(), Meter() as meter:
        planned = make_plan(load_recipe(recipe, [*overrides, f"output={folder}"]))
        model, _ = load_plain(planned.folder)
        touch(model)
        _cut(model, planned.blocks[0].name, limit)
        planned = replace(planned, blocks=planned.blocks[:limit])
        start = time.perf_counter()
        run_stages(planned, model, tokens, Path(folder), meter, Console(file=open("/dev/null", "w")))  # noqa: SIM115
        return {"total": time.perf_counter() - start} | meter.seconds


def touch(model: torch.nn.Module) -> None:
    """Read every page of memory-mapped weights, so that the disk is not measured."""
    for parameter in model.parameters():
        parameter.detach().view(-1)[::256].double().sum()


def _cut(model: torch.nn.Module, first: str, limit: int | None) -> None:
    layers = model.get_submodule(first.rpartition(".")[0])
    del layers[limit if limit is not None else len(layers) :]  # type: ignore[operator,arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--blocks", type=int, default=None, help="only the first so many")
    parser.add_argument("--solvers", nargs="+", default=["wanda", "sparsegpt"])
    given = parser.parse_args()
    overrides = [f"model={given.model}", f"pattern={given.pattern}"]
    overrides += [f"calibration.samples={given.samples}", f"calibration.length={given.length}"]
    with session():
        planned = make_plan(load_recipe(given.recipe, overrides))
        model, tokenizer = load_plain(planned.folder)
        touch(model)
        settings = {"source": "python-docs", "samples": given.samples, "length": given.length}
        tokens = calibration_tokens(settings, tokenizer)
    results: dict[str, Any] = {"settings": vars(given), "hardware": hardware(), "versions": versions()}
    walk(given.recipe, [*overrides, f"stages=[{given.solvers[0]}]"], tokens, 1)  # imports, first files, warm caches
    before = bare_work(model, tokens, planned.batch, given.blocks)
    for solver in given.solvers:
        parts = walk(given.recipe, [*overrides, f"stages=[{solver}]"], tokens, given.blocks)
        after = bare_work(model, tokens, planned.batch, given.blocks)
        parts_of_it = ("forward", "gram") if needs_gram(load("solvers", solver)) else ("forward",)
        bare = sum((before[part] + after[part]) / 2 for part in parts_of_it)
        ratio = parts["total"] / bare
        results[solver] = {"ratio": ratio, "walk": parts, "bare_before": before, "bare_after": after}
        print(
            f"{solver}: walk {parts['total']:.1f} s, bare work {bare:.1f} s "
            f"(forward twice {before['forward']:.1f}/{after['forward']:.1f}, Gram {before['gram']:.1f}/"
            f"{after['gram']:.1f}), ratio {ratio:.2f}; of the walk "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items() if name != "total"),
            flush=True,
        )
        before = after
    print(json.dumps(results))


if __name__ == "__main__":
    main()
