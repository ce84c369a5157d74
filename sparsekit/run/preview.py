"""What `--dry-run` shows: the resolved recipe, blocks and groups, and what a run will need."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console

from sparsekit.maths import Pattern, Unstructured
from sparsekit.model import Block
from sparsekit.recipe import to_yaml
from sparsekit.run.needs import wholly
from sparsekit.run.plan import Plan
from sparsekit.system import human_size


def show_plan(planned: Plan, console: Console) -> None:
    """Print it all; no weight is read."""
    from rich.table import Table

    console.print(to_yaml(planned.resolved), markup=False, highlight=False)
    table = Table(
        title=f"{planned.model.__class__.__name__}: {sum(b.number is not None for b in planned.blocks)} blocks",
        title_justify="left",
    )
    for column in ("blocks", "group", "linear", "out x in", "pattern"):
        table.add_column(column)
    later = f"set after a dense pass by {planned.recipe.allocation.name}" if planned.postponed else ""
    kinds: dict[Any, list[Block]] = {}
    for block in planned.blocks:
        shapes = tuple(
            tuple(
                (name.removeprefix(block.name) or name, block.linears[name].shape, planned.patterns.get(name))
                for name in group
            )
            for group in block.groups
        )
        kinds.setdefault(shapes, []).append(block)
    for shapes, alike in kinds.items():
        indices = _ranges([block.number for block in alike if block.number is not None])
        for number, group in enumerate(_once(shapes, alike[0])):
            for name, (out, width), pattern in group:
                said = later or (_text(pattern) if pattern else "")
                table.add_row(indices, str(number + 1), name.lstrip("."), f"{out} x {width}", said)
    console.print(table)
    for sentence in left_as_is(pair for block in planned.blocks for pair in block.skipped.items()):
        console.print(sentence, markup=False)
    for what, value in estimates(planned).items():
        console.print(f"{what}: {value}", highlight=False, markup=False)


def left_as_is(skipped: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What is not pruned, a sentence for each reason. skipped: (name, why)"""
    reasons: dict[str, list[str]] = {}
    for name, why in skipped:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - 3:,} others" if len(names) > 3 else ""
        yield f"left as it is: {', '.join(names[:3])}{more} ({why})"


def _once(shapes: Any, block: Block) -> list[Any]:
    """Groups of linears, those of experts that are alike named once, `experts.0-15`."""
    first = {f".{home}.0.": f".{home}.0-{experts.count - 1}." for home, experts in block.experts.items()}
    later = tuple(f".{home}.{index}." for home, e in block.experts.items() for index in range(1, e.count))
    found = []
    for group in shapes:
        if group[0][0].startswith(later):
            continue
        for start, span in first.items():
            group = tuple((name.replace(start, span, 1), *rest) for name, *rest in group)
        found.append(group)
    return found


def estimates(plan: Plan) -> dict[str, str]:
    """What a run will need, from shapes alone."""
    calibration = plan.recipe.calibration
    config, dtype = plan.config, plan.dtype
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    tokens = calibration.samples * plan.length
    streams = 2 if plan.recipe.error_correction == "model" else 1
    activations = tokens * config.hidden_size * dtype.itemsize * streams
    in_memory = min(activations, plan.memory[0])
    pruned = sum(linear.weight.numel() for block in plan.blocks for linear in block.linears.values())
    gram_work = 2 * tokens * sum(_width(block, names) ** 2 for block in plan.blocks for names in block.groups)
    once = {"none": 1, "prefix": 2, "sequential": 1 + len(plan.blocks[0].groups)}
    passes = once.get(plan.recipe.error_correction) or 2 + len(plan.blocks[0].groups)
    passes += bool(plan.postponed)
    found = {
        "weights on disk": human_size(parameters * dtype.itemsize),
        "activations": f"{human_size(activations)}, of which {human_size(in_memory)} in memory",
    }
    for stage, parts in plan.needs.items():
        said = ", ".join(f"{what} {human_size(size)}" for what, size in parts.items() if size)
        found[f"memory of {stage}"] = f"{human_size(sum(parts.values()) + in_memory)}: {said}, activations as above"
    for stage in wholly(plan.segments):
        found[f"memory of {stage}"] = "as much as the whole model needs: it does not go block by block"
    if not plan.patterns:  # no stage prunes weights, so what there is to do depends on the stage alone
        return found
    return found | {
        "forward work": f"{passes * 2 * tokens * pruned / 1e12:.2f} TFLOP in {passes} passes over {tokens:,} tokens",
        "Gram work": f"{gram_work / 1e12:.2f} TFLOP",
        "weights to prune": f"{pruned:,} of {parameters:,} ({pruned / parameters:.1%})",
    }


def _ranges(indices: list[int]) -> str:
    """Such as "0-4, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _text(pattern: Pattern) -> str:
    return f"{100 * pattern.sparsity:.6g}%" if isinstance(pattern, Unstructured) else str(pattern)


def _width(block: Block, names: list[str]) -> int:
    return block.linears[names[0]].shape[1]
