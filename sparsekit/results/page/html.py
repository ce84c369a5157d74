"""report.html: a run to look at, in one file that needs no script and no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.model import loading_code
from sparsekit.results.folder import REPORT, STATE
from sparsekit.results.manifest import seal
from sparsekit.results.page import kept, parts
from sparsekit.results.page.templating import document
from sparsekit.results.report import read_report
from sparsekit.system import write_atomically, write_json

PAGE = "report.html"


def page(report: Mapping[str, Any], metrics: str | None = None, folder: str | None = None) -> str:
    """A run's page as one self-contained HTML text.

    report: what report.json holds; whatever is absent from it has no section. metrics: the text of metrics.csv.
    folder: of the run, as the lines that load its model name it; the recipe's output unless told.
    """
    folder = folder or str(report.get("recipe", {}).get("output", "."))
    sections = {
        "Quality": parts.quality(report),
        "Remarks": parts.remarks(report),
        "Samples": parts.samples(report),
        "Speed and size": parts.speed(report),
        "Kept structure": kept.structure(report),
        "Linears": parts.linears(report),
        "Training": parts.training(report, metrics),
        "Time and memory": parts.cost(report),
        "Load it": parts.code(loading_code(Path(folder) / "model")),
        "Recipe": parts.recipe(report),
    }
    return document(parts.title(report), parts.under(report), parts.headline(report), sections)


def require_finished(folder: Path) -> None:
    """Raise ValueError unless the folder holds a finished run."""
    if not (folder / REPORT).is_file():
        why = "is not finished: continue it with --resume" if (folder / STATE).is_file() else f"has no {REPORT}"
        raise ValueError(f"{folder} {why}; only a finished run has a report")
    read_report(folder)


def write_page(folder: Path) -> Path:
    """Write report.html of a finished run, from its report.json and metrics.csv, and say where it is.

    Raises:
        ValueError: the folder holds no finished run.
    """
    require_finished(folder)
    report = read_report(folder)
    metrics = folder / "metrics.csv"
    logged = metrics.read_text(encoding="utf-8") if metrics.is_file() else None
    text = page(report, logged, str(folder))
    write_atomically(folder / PAGE, lambda aside: aside.write_text(text, encoding="utf-8"))
    seal(folder)
    return folder / PAGE


def add_to_report(folder: Path, entries: Mapping[str, Any]) -> Path:
    """Put entries, such as "speed", into a finished run's report.json, and write its page again: where that is.

    Raises:
        ValueError: the folder holds no finished run.
    """
    require_finished(folder)
    report = read_report(folder)
    write_json(folder / REPORT, report | dict(entries))
    return write_page(folder)
