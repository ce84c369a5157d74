"""What was measured, as figures: the one form that page, tables and comparisons read, of every version of reports."""

from collections.abc import Mapping
from typing import Any

from sparsekit.contracts import Figure

PERPLEXITY, TASK = "perplexity", "task"


def figures_of(measured: Mapping[str, Any] | None) -> dict[str, Figure]:
    """The figures of a model by name: a text's, "TASK METRIC", and those of metrics.

    measured: what `measure.evaluate` gives, as it stands in report.json; None: nothing
    """
    measured = measured or {}
    found = {}
    for name, value in measured.get("perplexity", {}).items():
        where = dict(measured.get("context", {}).get(name, {}))
        stderr = measured.get("perplexity_stderr", {}).get(name)
        found[name] = Figure(value, stderr, where.get("windows", 0), "windows", "lower", where, PERPLEXITY)
    for task, metrics in measured.get("tasks", {}).items():
        for metric, value in metrics.items():
            if metric not in ("n", "images") and not metric.endswith("_stderr"):
                less = metric.endswith(("perplexity", "bits_per_byte", "loss"))
                of = "images" if "images" in metrics else "documents"
                count = metrics.get("images", metrics.get("n", 0))
                found[f"{task} {metric}"] = Figure(
                    value,
                    metrics.get(f"{metric}_stderr"),
                    int(count),
                    of,
                    "lower" if less else "higher",
                    {of: count} if count else {},
                    TASK,
                )
    for name, figure in measured.get("figures", {}).items():
        found[name] = Figure(**figure)
    return found


def label(name: str, figure: Figure) -> str:
    """A figure's name in a table: what it is, of what, and on how much."""
    what = f"{figure.kind} {name}" if figure.kind == PERPLEXITY else name
    return f"{what}, {remark(figure)}" if remark(figure) and figure.kind != TASK else what


def remark(figure: Figure) -> str:
    """On how much it was measured: "24 x 64 tokens", "100 documents"."""
    if not figure.count:
        return ""
    if "length" in figure.settings and figure.of == "windows":
        first = ", a first token in each" if figure.settings.get("first_token") is not None else ""
        return f"{figure.count} x {figure.settings['length']} tokens{first}"
    return f"{figure.count:,} {figure.of}"


def shown(figure: Figure | None, absent: str = "-") -> str:
    """Its value, with as many digits as are worth reading, and ± one standard error where that is known."""
    if figure is None:
        return absent
    digits = 2 if figure.kind == PERPLEXITY else 3
    return f"{figure.value:.{digits}f}" + ("" if figure.stderr is None else f" ± {figure.stderr:.{digits}f}")
