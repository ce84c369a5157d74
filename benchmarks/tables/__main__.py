"""Run a paper's table again, and print what it has beside what was measured.

    python -m benchmarks.tables fistapruner --table 1 --model facebook/opt-125m [--rows Wanda] [--set key=value ...]

Without --table: the tables that are there. Every row is a recipe (see rows.py); a row that is finished in --output is
read from its report, an unfinished one is resumed. --set comes last, so it may change the text, its length or any
option of a row. --seeds runs each row with each of them, as the recipe's seed and the calibration's, and prints the
mean and the deviation. Exit status: 1 if a row failed or did not verify, 2 for a mistake in what was given.
"""

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from benchmarks.show import show
from benchmarks.tables.rows import Row, papers, rows, table, tables
from sparsekit.measure import evaluate
from sparsekit.model import load_plain
from sparsekit.results import REPORT
from sparsekit.run import make_plan, run_recipe
from sparsekit.system import session, write_json


def measured(row: Row, output: Path) -> dict[str, Any]:
    """The row's report: {"evaluation": {"pruned": ...}, "verified": ...}, from disk or from a run made now.

    Raises:
        ValueError, OSError: as `sparsekit.fit` does.
    """
    folder = output / row.folder
    report = folder / REPORT
    if not report.is_file():
        if row.dense:
            write_json(report, _dense(row))
        else:
            recipe = row.recipe.model_copy(update={"output": str(folder)})
            run_recipe(recipe, resume=True, console=Console(stderr=True))
        gc.collect()  # the model is gone before the next one is loaded
    return json.loads(report.read_text(encoding="utf-8"))


def _dense(row: Row) -> dict[str, Any]:
    """The model as it is."""
    settings = row.recipe.evaluate.model_dump(exclude={"dense", "samples"})
    spec = row.recipe.model
    with session():
        planned = make_plan(row.recipe)
        dtype = None if spec.dtype == "auto" else spec.dtype
        model, tokenizer = load_plain(planned.folder, dtype=dtype, trust_remote_code=spec.trust_remote_code)
        return {
            "evaluation": {"pruned": evaluate(model.to(planned.device), tokenizer, settings)},
            "verified": True,
        }


def figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Perplexities, accuracies of tasks, and of several tasks their `mean`, and other figures, by name."""
    accuracies = {task: metrics["acc"] for task, metrics in evaluation["tasks"].items() if "acc" in metrics}
    means = {"mean": mean(accuracies.values())} if len(accuracies) > 1 else {}
    others = {name: figure["value"] for name, figure in evaluation.get("figures", {}).items()}
    return evaluation["perplexity"] | accuracies | means | others


def objectives(blocks: Mapping[str, Any], index: int) -> dict[str, float]:
    """SparseLLM's objective after each epoch, in the block of this index or else in the last that was pruned."""
    notes = [block["sparsellm"]["objectives"] for block in blocks.values() if "sparsellm" in block]
    values = (notes[index : index + 1] or notes[-1:] or [[]])[0]
    return {f"epoch {epoch}": value for epoch, value in enumerate(values[2::3], 1)}  # p, z and s are updated in each


def sizes(report: Mapping[str, Any]) -> dict[str, float]:
    """Of a structural run, the share of the blocks' parameters that its first stage removed, and billions left."""
    if not (structure := report.get("structure")):
        return {}
    return {"removed": structure["removed"][0], "billions": structure["parameters"]["pruned"] / 1e9}


def run_table(
    chosen: Sequence[Row], output: Path, objective: int | None = None, wanted: Sequence[str] = ()
) -> tuple[list[dict[str, float]], list[str]]:
    """Measured figures of every row, empty where it failed, and what failed.

    objective: see `objectives`. wanted: of `sizes`, those to be among the figures
    """
    found: list[dict[str, float]] = []
    failed: list[str] = []
    for row in chosen:
        print(f"== {row.label}", file=sys.stderr, flush=True)
        try:
            report = measured(row, output)
        except (ValueError, OSError) as error:  # the other rows take hours: they shall not be lost
            found.append({})
            failed.append(f"{row.label}: {error}")
            continue
        curve = {} if objective is None else objectives(report["blocks"], objective)
        size = {name: value for name, value in sizes(report).items() if name in wanted}
        found.append(figures(report["evaluation"]["pruned"]) | curve | size)
        if report["verified"] is not True:
            failed.append(f"{row.label} did not verify: {'; '.join(report['verified'])}")
    return found, failed


@dataclass(frozen=True)
class Table:
    """What came of a table: its rows, for each seed the figures of every row, and what failed."""

    rows: list[Row]
    runs: list[list[dict[str, float]]]
    failed: list[str]


def run_seeds(
    paper: str,
    number: str,
    model: str | None,
    settings: Sequence[str],
    wanted: Sequence[str],
    seeds: Sequence[int],
    output: Path,
) -> Table:
    """A table's rows, see `rows`, once with each seed; without seeds, once as they are."""
    described = table(paper, number)
    every = [
        rows(paper, number, model, [*settings, *seeded], wanted)
        for seeded in ([f"seed={seed}", f"calibration.seed={seed}"] for seed in seeds)
    ] or [rows(paper, number, model, settings, wanted)]
    runs = [run_table(chosen, output, described.get("objective"), described["figures"]) for chosen in every]
    return Table(every[0], [found for found, _ in runs], list(dict.fromkeys(s for _, failed in runs for s in failed)))


def shown(values: Sequence[float], decimals: int | None) -> str:
    """Their mean, and of several their standard deviation. decimals: null: 4 below 1, else 2."""
    if not values:
        return ""
    texts = [mean(values), *([stdev(values)] if len(values) > 1 else [])]
    if decimals is None:
        decimals = 2 if abs(texts[0]) >= 1 else 4
    return " ± ".join(f"{each:.{decimals}f}" for each in texts)


def cells(done: Table, described: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows to print: the labels, then for each figure that was measured the paper's, if any, and ours."""
    names = list(dict.fromkeys(name for found in done.runs for each in found for name in each))
    head = ["method", *([described["sweep"]["key"]] if "sweep" in described else []), "sparsity"]
    if described.get("sweep", {}).get("key") == "pattern" or not any("pattern" in row for row in described["rows"]):
        head.remove("sparsity")
    decimals = described.get("decimals")
    printed = any(entry for row in described["rows"] for entry in row["paper"])
    lines = []
    for row, *own in zip(done.rows, *done.runs, strict=True):
        label = {"method": row.method, "sparsity": "dense" if row.dense else row.pattern}
        line = [label.get(column, row.swept) for column in head]
        for name in names:
            sides = ([row.paper], own) if printed else (own,)
            line += [shown([of[name] for of in some if name in of], decimals) for some in sides]
        lines.append(line)
    columns = [column for name in names for column in ([f"{name}, paper", name] if printed else [name])]
    return [*head, *columns], lines


def _list(paper: str | None) -> int:
    for name in [paper] if paper else papers():
        for number, described in tables(name).items():
            print(f"{name} --table {number}: {described['title']}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("paper", nargs="?", help=f"one of {', '.join(papers())}")
    parser.add_argument("--table", help="its number; without it the tables are listed")
    parser.add_argument("--model", help="hub name, folder or bundled model; default: the table's first")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="only rows with such a text in the name")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="for every row; default: that of the recipe")
    parser.add_argument("--output", type=Path, default=Path("runs/tables"), help="default runs/tables")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a table and print it."""
    given = _arguments(argv)
    try:
        if given.paper is None or given.table is None:
            return _list(given.paper)
        described = table(given.paper, given.table)
        done = run_seeds(given.paper, given.table, given.model, given.set, given.rows, given.seeds, given.output)
    except ValueError as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    columns, lines = cells(done, described)
    title = f"{given.paper}, table {given.table}: {described['title']}; here {done.rows[0].recipe.model.path}"
    show(columns, lines, title=title, markdown=given.markdown)
    for sentence in done.failed:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
