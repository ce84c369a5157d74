"""What a run tells in words: the closing table, the model card, titles."""

from pathlib import Path
from typing import Any

from sparsekit.results.figures import figures_of, label, shown
from sparsekit.system import human_size


def quality_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, dense, pruned) of everything that was evaluated, context length included."""
    dense, pruned = (figures_of(report["evaluation"].get(who)) for who in ("dense", "pruned"))
    return [(label(name, each), shown(dense.get(name)), shown(each)) for name, each in pruned.items()]


def aim(report: dict[str, Any]) -> str:
    """What was done to the model, for titles: "pruned to 2:4", "30.0% of its parameters removed"."""
    pattern = report["recipe"]["pattern"]
    if isinstance(pattern, dict):
        pattern = ", ".join(f"{asked} ({target})" for target, asked in pattern.items())
    said = [f"pruned to {pattern}"] if report["sparsity"]["per_linear"] else []
    if "structure" in report:
        said.insert(0, f"{removed_share(report['structure']):.1%} of its parameters removed")
    return " and ".join(said) or "trained"


def removed_share(structure: dict[str, Any]) -> float:
    """The share of all the source's parameters that is gone, after all cuts, those of earlier runs included."""
    if (count := structure.get("parameters")) is None:  # a report of an earlier version tells that of the blocks alone
        return float(structure.get("total", 0.0))
    return float(1 - count["pruned"] / count["dense"])


def shareable(value: Any) -> Any:
    """The same without paths of this machine: of an absolute path only its name."""
    if isinstance(value, dict):
        return {key: shareable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shareable(each) for each in value]
    local = isinstance(value, str) and "\n" not in value and (Path(value).is_absolute() or value.startswith("~"))
    return Path(value).name or value if local else value


def _metadata(report: dict[str, Any]) -> str:
    """The head of a model card, as the hub reads it: what the model was made of, what it is, how it was measured."""
    from huggingface_hub import ModelCardData

    name = report["model"]["name"]
    hub = not Path(name).is_absolute() and not Path(name).exists() and name.count("/") == 1
    pattern = report["recipe"]["pattern"]
    tags = ["sparsekit", "pruned"] + ([str(pattern)] if isinstance(pattern, str) else [])
    tags += [next(iter(stage)) for stage in report["recipe"]["stages"]]
    language = str(report["model"].get("class", "")).endswith("ForCausalLM")
    metrics = sorted({each.kind for each in figures_of(report["evaluation"].get("pruned")).values()})
    told = ModelCardData(
        base_model=name if hub else None,
        library_name="transformers",
        pipeline_tag="text-generation" if language else None,
        tags=list(dict.fromkeys(tags)),
        metrics=metrics or None,
    )
    return f"---\n{told.to_yaml().strip()}\n---\n"


def model_card(report: dict[str, Any], recipe: str, loading: str) -> str:
    """README.md of the pruned model: what was done to it, what it is worth, how to load it.

    recipe: as YAML; loading: lines of Python. Both without paths of this machine (`shareable`).
    """
    rows = quality_rows(report)
    lines = [_metadata(report), f"# {shareable(report['model']['name'])}, {aim(report)}", ""]
    if "structure" in report:
        lines += [_structure(report["structure"]), ""]
    if report["sparsity"]["per_linear"]:
        lines += [
            f"{report['sparsity']['total']:.2%} of the weights in the linears of its blocks are zero "
            f"({report['sparsity']['zeros']:,} of {report['sparsity']['parameters']:,}). {_of_all(report)}"
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
    if "manifest" in report:
        lines += [
            f"Manifest of the run: `{report['manifest']}` (`sparsekit verify` of its folder compares with it).",
            "",
        ]
    lines += ["## Load it", "", "```python", loading, "```", "", "## Recipe", "", "```yaml", recipe.strip()]
    lines += ["```", "", "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items())]
    return "\n".join(lines) + "\n"


def _of_all(report: dict[str, Any]) -> str:
    """The share of the whole model, which earlier versions did not tell."""
    whole = report["sparsity"].get("whole")
    return f"Of all weights of the model {whole['share']:.2%} are zero or gone. " if whole else ""


def tokens_of_experts(report: dict[str, Any]) -> list[int]:
    """How many calibration tokens each expert of each block was sent; empty where there are no experts."""
    blocks = (report.get("blocks") or {}).values()
    return [count for notes in blocks for counts in notes.get("tokens", {}).values() for count in counts]


def _structure(structure: dict[str, Any]) -> str:
    before, after = structure["parameters"]["dense"], structure["parameters"]["pruned"]
    kept = len(structure["layers"])
    return f"{after:,} of {before:,} parameters are left ({after / before:.1%}), in {kept} layers."


def closing_table(report: dict[str, Any], folder: str) -> Any:
    """The rich table that ends a run."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{report['model']['name']}, {aim(report)}"), title_justify="left")
    for column, justify in (("", "left"), ("dense", "right"), ("pruned", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in quality_rows(report):
        table.add_row(*map(escape, row))
    verified = report["verified"] is True
    proof = "proved from disk" if verified else "[bold red]NOT as asked[/]"
    if "structure" in report:
        parameters = report["structure"]["parameters"]
        table.add_row(f"parameters, {proof}", f"{parameters['dense']:,}", f"{parameters['pruned']:,}")
    if report["sparsity"]["per_linear"]:
        table.add_row(f"sparsity of the pruned linears, {proof}", "", f"{report['sparsity']['total']:.2%}")
        if "whole" in report["sparsity"]:
            table.add_row("of all weights, zero or gone", "", f"{report['sparsity']['whole']['share']:.2%}")
    if seen := tokens_of_experts(report):
        table.add_row("tokens that an expert was sent", "", f"{min(seen):,} to {max(seen):,}")
    table.add_row("seconds, all stages", "", f"{sum(stage['seconds'] for stage in report['stages']):.0f}")
    peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
    table.add_row("peak memory of the process", "", human_size(peak))
    if there := [stage["peak_device_bytes"] for stage in report["stages"] if stage.get("peak_device_bytes")]:
        table.add_row("peak memory on the device", "", human_size(max(there)))
    table.add_row("the result", "", escape(folder))
    return table
