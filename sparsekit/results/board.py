"""`sparsekit compare`: the figures of finished runs in one table, best first."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.contracts import Figure
from sparsekit.results import distance
from sparsekit.results.comparison import Run, check_comparable, read_run
from sparsekit.results.figures import figures_of
from sparsekit.results.words import aim, removed_share
from sparsekit.system import human_size

LOWER = ("size", "packed", "seconds", "memory")  # of the columns that are no quality, these are better when low
AROUND = ("prepare", "load", "save", "verify")  # stages that are no part of what pruning costs
TEXTS = ("run", "model", "result", "stages", "masks of")  # columns that are no figures
TIMED = ("prefill", "decode", "images")  # what bench measures
KIND = {"sparsity": "share", "removed": "share", **dict.fromkeys(TIMED, "times")}
KIND |= {"size": "bytes", "packed": "bytes", "seconds": "seconds", "memory": "bytes"}


def leaderboard(paths: Sequence[str], *, by: str | None = None) -> dict[str, Any]:
    """The figures of finished runs, best first.

    by: the column to sort by (a text, "TASK METRIC", sparsity, removed, size, packed, prefill, decode, seconds,
    memory), the first perplexity, or else the first task, unless told. Runs that lack the figure come last.

    Returns {"by", "lower" (whether less is better in it), "columns", "context": {text: {length, windows}},
    "dense": [row], "runs": [row], "notes": [sentence], "distances": what `distance.distances` gives};
    a row is {"run", "model", "asked", "stages", "verified", "values": {column: number}, "stderr": {column: number}}.
    Sizes are bytes of model/ and model-packed/; prefill, decode and images how many times faster than dense, at the
    smallest batch of `sparsekit bench`; seconds and memory (bytes) what the stages of pruning and recovery took.

    Raises:
        ValueError: a run is not finished, was not measured, or not like the others; or no column is called `by`.
    """
    runs = [read_run(path) for path in paths]
    check_comparable(runs)
    rows = [_row(run) for run in runs]
    dense = _dense(runs)
    quality = {name: each for run in reversed(runs) for name, each in run.figures.items()}
    columns = list(dict.fromkeys(name for run in runs for name in run.figures))
    columns += [name for name in KIND if any(name in row["values"] for row in rows)]
    by = by or columns[0]
    if by not in columns:
        raise ValueError(f"no column `{by}`, {registry.suggest(by, columns)}")
    sign = 1 if by in LOWER or (by in quality and quality[by].better == "lower") else -1
    rows.sort(key=lambda row: (sign * row["values"][by] if by in row["values"] else math.inf, row["run"]))
    context = {name: each.settings for name, each in quality.items() if "windows" in each.settings}
    by_path = {run.path: run for run in runs}
    apart = distance.distances([by_path[row["run"]] for row in rows])
    keys = ("by", "lower", "columns", "context", "dense", "runs", "notes", "distances")
    return dict(zip(keys, (by, sign > 0, columns, context, dense, rows, list(_notes(runs)), apart), strict=True))


def _row(run: Run) -> dict[str, Any]:
    found = run.report
    values: dict[str, float] = {name: each.value for name, each in run.figures.items()}
    if found["sparsity"]["per_linear"]:
        values["sparsity"] = found["sparsity"]["total"]
    if "structure" in found:
        values["removed"] = removed_share(found["structure"])
    for column, inside in (("size", "model"), ("packed", "model-packed")):
        if (Path(run.path) / inside).is_dir():
            values[column] = sum(file.stat().st_size for file in (Path(run.path) / inside).rglob("*"))
    for column in TIMED:
        if ratios := found.get("speed", {}).get("faster", {}).get(column):
            values[column] = ratios[min(ratios, key=int)]
    cost = [stage for stage in found["stages"] if not around(stage["name"])]
    values["seconds"] = sum(stage["seconds"] for stage in cost)
    values["memory"] = max((stage["peak_memory_bytes"] for stage in cost), default=0)
    return {
        "run": run.path,
        "model": found["model"]["name"],
        "asked": aim(found),
        "stages": " > ".join(next(iter(stage)) for stage in found["recipe"]["stages"]),
        "verified": found["verified"] is True,
        "values": values,
        "stderr": _stderr(run.figures),
    }


def around(stage: str) -> bool:
    """Whether a stage of this name is no part of pruning or recovery: reading, writing, proving, measuring."""
    return stage in AROUND or stage.startswith("evaluate")


def _dense(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each source model, with the dense figures of all its runs."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        if measured := figures_of(run.report["evaluation"].get("dense")):
            name = run.report["model"]["name"]
            row = rows.setdefault(name, {"run": "dense", "model": name, "values": {}, "stderr": {}})
            row["values"] = {name: each.value for name, each in measured.items()} | row["values"]
            row["stderr"] = _stderr(measured) | row["stderr"]
    return list(rows.values())


def _stderr(figures: Mapping[str, Figure]) -> dict[str, float]:
    return {name: each.stderr for name, each in figures.items() if each.stderr is not None}


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    if len({json.dumps(run.report.get("hardware"), sort_keys=True) for run in runs}) > 1:
        yield "seconds and memory: the runs were not made on the same machine with the same number of threads"
    speeds = [run.report["speed"] for run in runs if "speed" in run.report]
    if len({json.dumps([each.get("settings"), each.get("hardware")], sort_keys=True) for each in speeds}) > 1:
        yield "prefill and decode: not measured with the same settings on the same machine; bench the runs again"
    for run in runs:
        if run.report["verified"] is not True:
            yield f"{run.path}: its result is not as asked: {'; '.join(run.report['verified'])}"


def cells(board: dict[str, Any]) -> list[list[str]]:
    """The leaderboard as text: a line of headings, the dense models, the runs."""
    several = len({row["model"] for row in board["runs"]}) > 1
    names = _names(board)
    lines = [["run", *(["model"] if several else []), "result", "stages", *board["columns"]]]
    for row in board["dense"] + board["runs"]:
        name = names[row["run"]]
        name = name if row.get("verified", True) else f"{name} (NOT as asked)"
        line = [name, *([row["model"]] if several else []), row.get("asked", ""), row.get("stages", "")]
        values, stderr = row["values"], row["stderr"]
        lines.append(line + [_cell(c, values.get(c), stderr.get(c), c in board["context"]) for c in board["columns"]])
    return lines


def _names(board: dict[str, Any]) -> dict[str, str]:
    """What a run is called: the name of its folder, or its path where others have the same name."""
    folders = [Path(row["run"]).name for row in board["runs"]]
    short = {row["run"]: Path(row["run"]).name for row in board["dense"] + board["runs"]}
    return {run: name if folders.count(name) < 2 else run for run, name in short.items()}


def _cell(column: str, value: float | None, stderr: float | None, text: bool) -> str:
    if value is None:
        return ""
    if column in KIND and not text:
        formats = {"share": f"{value:.2%}", "bytes": human_size(value), "times": f"{value:.2f} x"}
        return formats.get(KIND[column], f"{value:.0f}")
    digits = 2 if text else 3
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def notes(board: dict[str, Any]) -> list[str]:
    """What belongs below the table: how the texts were cut, and what to be careful with."""
    windows = [f"{name} {where['windows']} x {where['length']}" for name, where in board["context"].items()]
    sure = any(row["stderr"] for row in board["dense"] + board["runs"])
    said = ["± is one standard error"] if sure else []
    return said + ([f"windows x tokens: {', '.join(windows)}"] if windows else []) + board["notes"]


def tables(board: dict[str, Any]) -> list[tuple[list[list[str]], list[str]]]:
    """The leaderboard and, where runs have masks that compare, their distances: (headings and lines, notes below)."""
    names = _names(board)
    lines, said = distance.cells(board["distances"], names), distance.notes(board["distances"], names)
    return [(cells(board), notes(board)), (lines, said)] if lines else [(cells(board), notes(board) + said)]


def board_markdown(board: dict[str, Any]) -> str:
    """The tables in Markdown, with the notes below each."""
    parts = []
    for (first, *rest), said in tables(board):
        lines = [first, ["---"] * len(first), *rest]
        parts.append(
            "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        )
        parts += said
    return "\n\n".join(parts)


def show_board(board: dict[str, Any], console: Any) -> None:
    """The tables on a terminal; without one in plain columns that are never folded."""
    for number, (lines, said) in enumerate(tables(board)):
        if number:
            console.print()
        _print(lines, console, None if number else f"by {board['by']}")
        for note in said:
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def _print(lines: list[list[str]], console: Any, title: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first, *rest = lines
    sides = ["left" if head in TEXTS else "right" for head in first]
    if console.is_terminal:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for head, side in zip(first, sides, strict=True):
            table.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
        for line in rest:
            table.add_row(*map(Text, line))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(first, *rest, strict=True)]
    for line in lines:
        cut = [
            f"{cell:{'<' if side == 'left' else '>'}{width}}"
            for cell, side, width in zip(line, sides, widths, strict=True)
        ]
        print("  ".join(cut).rstrip(), file=console.file)
