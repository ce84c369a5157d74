"""Which linears a recipe prunes: those of `targets`, without those of `ignore`, and of the keys of `pattern`."""

from collections.abc import Iterable, Sequence

from torch import nn

from sparsekit import registry
from sparsekit.model import KINDS, Block, discover, meant, named_convolutions, names_convolutions
from sparsekit.recipe import Recipe, kind, targets_of
from sparsekit.run.allocation import sample_input


def found_blocks(recipe: Recipe, model: nn.Module) -> list[Block]:
    """The blocks of a model, on whatever device, with the linears that the recipe prunes.

    Raises:
        ValueError: see `discover`; or a name that means no linear, or no linear is left.
    """
    asked = recipe.targets or []
    convolutions = named_convolutions(model, asked)
    blocks = discover(model, sample_input(model), routers="router" in asked, convolutions=convolutions)
    keys = list(recipe.pattern) if isinstance(recipe.pattern, dict) else None
    told = [("targets", asked), ("ignore", recipe.ignore), ("pattern", keys or [])]
    solvers = [stage for stage in recipe.stages if kind(stage) == "solver"]
    told += [(f"targets of `{stage.name}`", targets_of(stage) or []) for stage in solvers]
    for what, names in told:
        _known(model, blocks, what, names)
    for block in blocks:
        for name in list(block.linears):
            if recipe.prune in ("encoder", "decoder") and block.part != (recipe.prune == "decoder"):
                block.skipped[name] = f"not in the {recipe.prune}"
            elif why := _left(block, name, recipe.targets, recipe.ignore, keys):
                block.skipped[name] = why
        block.keep_only(block.linears.keys() - block.skipped.keys())
    blocks = _without_idle(blocks)
    if not any(block.linears for block in blocks):
        raise ValueError("prune, targets, ignore and pattern leave no linear to prune; give others")
    return blocks


def _without_idle(blocks: list[Block]) -> list[Block]:
    """The blocks without convolutions that stand alone and are left as they are: nothing is to be done at these."""
    left = [block for block in blocks if block.number is not None or block.linears]
    for block in blocks:
        if block not in left:
            left[0].skipped |= block.skipped
    for index, block in enumerate(left):
        block.index = index
    return left


def _left(
    block: Block, name: str, targets: Sequence[str] | None, ignore: Iterable[str], keys: Iterable[str] | None
) -> str:
    """Why a linear is left as it is; empty: it is not."""
    if targets is not None and not any(meant(block, name, target) for target in targets):
        return "not among the targets"
    if any(meant(block, name, target) for target in ignore):
        return "to be ignored"
    if keys is not None and not any(meant(block, name, key) for key in keys):
        return "no pattern is given for it"
    return ""


def _known(model: nn.Module, blocks: Sequence[Block], what: str, names: Iterable[str]) -> None:
    for target in names:
        if any(meant(block, name, target) for block in blocks for name in block.linears):
            continue
        if names_convolutions(model, target):
            why = (
                "convolutions of groups, or dilated ones, which are no linears over patches"
                if what == "targets"
                else "convolutions, which are left as they are unless `targets` names them: name them there too"
            )
            raise ValueError(f"{what}: `{target}` means {why}")
        if target in KINDS:
            raise ValueError(f"{what}: this model has no linears of the kind `{target}`; name others, or leave it out")
        parts = {part for block in blocks for name in block.linears for part in name.split(".")[-2:]}
        parts |= {name.rpartition(".")[2] for name in named_convolutions(model, ["convolution"])}
        parts = {part for part in parts if not part.isdigit()} | set(KINDS)
        raise ValueError(
            f"{what}: `{target}` means no linear of this model, {registry.suggest(target, sorted(parts))} "
            f"(or a range such as `blocks 0-{sum(block.number is not None for block in blocks) - 1}`)"
        )
