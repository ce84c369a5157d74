"""What a run tells in words: the closing table, the model card, titles."""

import math
from typing import Any

from sparsekit.system import human_size


def quality_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, dense, pruned) of everything that was evaluated, context length included."""
    evaluation = report["evaluation"]
    dense, pruned = evaluation.get("dense") or {}, evaluation.get("pruned") or {}
    rows = []
    for name, value in pruned.get("perplexity", {}).items():
        context = pruned["context"][name]
        before = dense.get("perplexity", {}).get(name)
        what = f"perplexity {name}, {context['windows']} x {context['length']} tokens"
        rows.append((what, "-" if before is None else f"{before:.2f}", f"{value:.2f}"))
    for name, metrics in pruned.get("tasks", {}).items():
        for metric in (key for key in metrics if key.startswith("acc") and not key.endswith("_stderr")):
            before = dense.get("tasks", {}).get(name, {}).get(metric)
            rows.append((f"{name} {metric}", "-" if before is None else f"{before:.3f}", f"{metrics[metric]:.3f}"))
    for name, figure in pruned.get("figures", {}).items():
        before = dense.get("figures", {}).get(name, {}).get("value")
        what = f"{name}, {figure['count']} {figure['of']}" if figure["count"] else name
        rows.append((what, "-" if before is None else f"{before:.3f}", f"{figure['value']:.3f}"))
    return rows


def aim(report: dict[str, Any]) -> str:
    """What was done to the model, for titles: "pruned to 2:4", "30.0% of its blocks removed"."""
    said = [f"pruned to {report['recipe']['pattern']}"] if report["sparsity"]["per_linear"] else []
    if "structure" in report:
        said.insert(0, f"{removed_share(report['structure']):.1%} of its blocks removed")
    return " and ".join(said) or "trained"


def removed_share(structure: dict[str, Any]) -> float:
    """The share of the source blocks' parameters that is gone, after all cuts, those of earlier runs included."""
    return structure.get("total", 1 - math.prod(1 - share for share in structure["removed"]))


def model_card(report: dict[str, Any], recipe: str, loading: str) -> str:
    """README.md of the pruned model: what was done to it, what it is worth, how to load it."""
    rows = quality_rows(report)
    lines = [f"# {report['model']['name']}, {aim(report)}", ""]
    if "structure" in report:
        lines += [_structure(report["structure"]), ""]
    if report["sparsity"]["per_linear"]:
        lines += [
            f"{report['sparsity']['total']:.2%} of the weights in the linears of its blocks are zero "
            f"({report['sparsity']['zeros']:,} of {report['sparsity']['parameters']:,}). "
            "Embeddings, the head and whatever no stage trains are the source model's.",
            "",
            "Zeros change neither the file's size nor the speed of ordinary kernels: they pay only where the hardware "
            "or the runtime uses them.",
            "",
        ]
    if rows:
        lines += ["| quality | dense | pruned |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows), ""]
    verified = report["verified"]
    lines += ["Checked from disk: " + ("everything holds." if verified is True else "; ".join(verified)), ""]
    lines += ["## Load it", "", "```python", loading, "```", "", "## Recipe", "", "```yaml", recipe.strip()]
    lines += ["```", "", "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items())]
    return "\n".join(lines) + "\n"


def _structure(structure: dict[str, Any]) -> str:
    before, after = structure["parameters"]["dense"], structure["parameters"]["pruned"]
    kept = len(structure["layers"])
    return f"{after:,} of {before:,} parameters are left ({after / before:.1%}), in {kept} layers."


def closing_table(report: dict[str, Any], folder: str) -> Any:
    """The rich table that ends a run."""
    from rich.table import Table

    table = Table(title=f"{report['model']['name']}, {aim(report)}", title_justify="left")
    for column, justify in (("", "left"), ("dense", "right"), ("pruned", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in quality_rows(report):
        table.add_row(*row)
    verified = report["verified"] is True
    proof = "proved from disk" if verified else "[bold red]NOT as asked[/]"
    if "structure" in report:
        parameters = report["structure"]["parameters"]
        table.add_row(f"parameters, {proof}", f"{parameters['dense']:,}", f"{parameters['pruned']:,}")
    if report["sparsity"]["per_linear"]:
        table.add_row(f"sparsity of the pruned linears, {proof}", "", f"{report['sparsity']['total']:.2%}")
    table.add_row("seconds, all stages", "", f"{sum(stage['seconds'] for stage in report['stages']):.0f}")
    peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
    table.add_row("peak memory of the process", "", human_size(peak))
    table.add_row("the result", "", folder)
    return table
