"""The page of `sparsekit compare --html`: runs side by side, in one file that needs no script and no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.results.board import KIND, LOWER, tables
from sparsekit.results.page.charts import scatter
from sparsekit.results.page.heat import heat
from sparsekit.results.page.templating import document, joined, section
from sparsekit.results.report import read_report
from sparsekit.system import human_size, write_atomically

COSTS = {  # columns that quality is drawn against -> what the axis says
    "size": "size of model/",
    "seconds": "seconds of pruning and recovery",
    "removed": "parameters removed",
    "decode": "times dense in decoding",
    "images": "times dense in images",
}


def write_comparison(board: Mapping[str, Any], file: Path) -> None:
    """Write the page of a board that `leaderboard` made."""
    reports = {row["run"]: read_report(Path(row["run"])) for row in board["runs"]}
    text = comparison(board, reports)
    write_atomically(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def comparison(board: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as one HTML text. reports: what report.json of each run holds, by the run's path"""
    names = {run: Path(run).name for run in reports}
    if len(set(names.values())) < len(names):
        names = {run: run for run in reports}
    sections = {
        "Figures": _figures(board),
        "Quality and price": _prices(board, names),
        "Linears": _linears(reports, names),
        "Samples": _samples(reports, names),
    }
    models = ", ".join(sorted({str(row["model"]) for row in board["runs"]}))
    best = board["runs"][0]
    lead = f"{len(reports)} runs of {models}, by {board['by']}; {names[best['run']]} is first"
    return document("Runs compared", lead, "", sections)


def _figures(board: Mapping[str, Any]) -> str:
    parts = []
    for (head, *rows), said in tables(dict(board)):
        parts.append(section("table", head=head, rows=rows))
        parts += [section("note", said=note) for note in said]
    return joined(*parts)


def _prices(board: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The column that runs are sorted by, drawn against what it costs."""
    by, charts = board["by"], []
    for column, axis in COSTS.items():
        rows = [row for row in board["runs"] if {by, column} <= row["values"].keys()]
        if column == by or len({row["values"][column] for row in rows}) < 2:
            continue
        points = {names[row["run"]]: (row["values"][column], row["values"][by]) for row in rows}
        show = human_size if KIND.get(column) == "bytes" else None
        less = (column in LOWER, board["lower"])
        charts.append(scatter(f"{by} and {axis}", points, x=axis, y=by, less=less, show=show))
    if not charts:
        return ""
    said = "The line joins runs that no other run betters in both; rest on a point to read it."
    return section("wide", charts=charts, note=said)


def _linears(reports: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    errors = {run: report.get("error") or {} for run, report in reports.items()}
    maps = [heat(f"{names[run]}: error of the output, %", "error", error) for run, error in errors.items()]
    return section("wide", charts=maps) if any(maps) else ""


def _samples(reports: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """What the models say after the prompts that all runs have."""
    said: dict[str, dict[str, str]] = {}
    for run, report in reports.items():
        for sample in report.get("samples") or []:
            if "pruned" in sample:
                told = said.setdefault(str(sample.get("prompt", "")), {})
                if "dense" in sample:
                    told.setdefault("dense", sample["dense"])
                told[names[run]] = sample["pruned"]
    shared = {prompt: told for prompt, told in said.items() if set(names.values()) <= told.keys()}
    prompts = [(prompt, "wide", list(told.items())) for prompt, told in shared.items()]
    return section("samples", prompts=prompts) if prompts else ""
