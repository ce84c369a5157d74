"""LLM-Pruner: channels and heads by a Taylor expansion of the loss, with gradients of the calibration text."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from sparsekit.contracts import Context, Decision, scores
from sparsekit.model import Linear
from sparsekit.model.structure import Units, choose
from sparsekit.train import backward

Taylor = Literal["param_first", "param_second", "param_mix"]
Blocks = Annotated[int, Ge(0)]


@scores(
    "heads",
    "channels",
    "mamba",
    "attention",
    "mlp",
    removes=("heads", "channels"),
    shape="uniform",
    gradients=True,
    reads=("text", "images"),
)
def llm_pruner(
    context: Context,
    units: Units,
    *,
    remove: float,
    taylor: Taylor = "param_first",
    shape: Literal["free", "uniform", "serving"] = "uniform",
    skip_first: Blocks = 0,
    skip_last: Blocks = 0,
) -> Decision:
    """Remove the KV groups and MLP channels without which the loss changes least, by its gradient.

    With g the gradient of the mean loss and a the mean over sequences of the squared gradient of each, a weight scores
    |w g| (param_first), w^2 a (param_second) or |w g - w^2 a / 2| (param_mix). A unit has the sum over all that goes
    with it: the rows of q, k, v and the columns of o of a KV group, the rows of gate and up and the column of down.
    Of vision models the loss is that of the class which the model itself finds likeliest, or, where it names none, the
    energy of its features.

    shape: uniform, as published, ranks the units of a block against one another; free those of all blocks; serving, of
        all blocks, whole attentions and channels by 256
    skip_first, skip_last: blocks that stay whole, so that the others give up more; 4 and 2 of 32 as published, but then
        shapes differ between blocks, and plain transformers cannot load the result

    Source: Ma et al. 2023, LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv:2305.11627.
    Cost: a forward and backward pass of the calibration text; one sequence at a time except for param_first. Memory:
    the linears' gradients in float32, twice for param_mix.
    """
    kept = partial(_kept, units, remove, len(context.blocks), skip_first, skip_last, shape)
    if skip_first or skip_last:
        kept(torch.zeros(len(units)))  # so that it is said now if the blocks between cannot give up so much
    values = _values(context, units, taylor)
    found = torch.zeros(len(units))
    for number, part in enumerate(units.parts):
        rows = [values[name].sum(1)[each].sum(1) for name, each in part.inputs.items()]  # each (count,)
        columns = values[str(part.output)].sum(0)[part.columns].sum(1)
        found[units.part == number] = torch.stack([*rows, columns]).sum(0)
    return Decision(found, kept=kept(found) if skip_first or skip_last else None)


@torch.no_grad()
def _values(context: Context, units: Units, taylor: Taylor) -> dict[str, Tensor]:
    """What each weight (out, in) of the units' linears is worth, by the linear's name, on the CPU."""
    names = {name for part in units.parts for name in (*part.inputs, str(part.output))}
    linears = {name: block.linears[name] for block in context.blocks for name in block.linears if name in names}
    tokens = context.tokens[context.team.rank :: context.team.size]
    device = context.device
    context.model.to(device)
    try:
        with _gradients(context.model, linears, squared=taylor != "param_first") as (first, second):
            for batch in tokens.split(context.batch if taylor == "param_first" else 1):
                backward(context.model, batch.to(device))
        total = torch.tensor(float(len(tokens)), device=device)
        context.team.sum([*first.values(), *second.values(), total])
        worth = {name: _worth(linears[name], first[name], second.get(name), float(total), taylor) for name in linears}
    finally:
        context.model.to("cpu")
    return worth


def _worth(linear: Linear, first: Tensor, second: Tensor | None, count: float, taylor: Taylor) -> Tensor:
    """first, second: sums over sequences of the gradient and of its square, as the linear's weight is stored."""
    weight = linear.weight.float()
    slope = weight * linear.matrix(first) / count
    if second is None:
        return slope.abs().cpu()
    curve = weight.square() * linear.matrix(second) / count
    return (curve if taylor == "param_second" else (slope - curve / 2).abs()).cpu()


@contextmanager
def _gradients(
    model: nn.Module, linears: dict[str, Linear], squared: bool
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """While this lasts, the linears' gradients, and their squares if asked, are added up in float32 as they come.

    No gradient of any other parameter is computed, and none is left behind.
    """
    weights: dict[str, Any] = {name: linear.module.weight for name, linear in linears.items()}
    first = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    second = {name: torch.zeros_like(each) for name, each in first.items()} if squared else {}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def add(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.float(), None
        first[name] += gradient
        if squared:
            second[name] += gradient.square()

    hooks = []
    model.requires_grad_(False)
    for name, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
    try:
        yield first, second
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)


def _kept(
    units: Units, remove: float, count: int, skip_first: int, skip_last: int, shape: str, scores: Tensor
) -> Tensor:
    """The mask (units,) that removes `remove` of all blocks' parameters from the blocks that are not skipped."""
    if skip_first + skip_last >= count:
        raise ValueError(
            f"skip_first is {skip_first} and skip_last {skip_last}; they must leave one of the {count} blocks"
        )
    inner = (units.block >= skip_first) & (units.block < count - skip_last)
    if int(units.parameters[inner].sum()) <= remove * units.total:
        raise ValueError(
            f"skip_first {skip_first} and skip_last {skip_last} leave {count - skip_first - skip_last} of {count} "
            f"blocks, which cannot give up {remove:.0%} of all blocks' parameters; remove or skip less"
        )
    parts = tuple(part for number, part in enumerate(units.parts) if bool(inner[units.part == number].any()))
    total = units.total * len({part.block for part in parts}) // len({part.block for part in units.parts})
    kept = torch.ones(len(units), dtype=torch.bool)
    kept[inner] = choose(Units(parts, total), scores[inner], remove * units.total / total, shape=shape)
    return kept
