"""FLAP: channels and heads by how much their outputs fluctuate; what they are on average becomes a bias."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekit.contracts import Context, Decision, scores
from sparsekit.model import Block, Linear
from sparsekit.model.structure import Part, Units
from sparsekit.walk import Moments, walked


@scores(
    "heads",
    "channels",
    "mamba",
    removes=("heads", "channels"),
    budgets="joint",
    bias=True,
    reads=("text", "images"),
)
@torch.no_grad()
def flap(context: Context, units: Units, *, remove: float) -> Decision:
    """Remove the KV groups and MLP channels that fluctuate least, and put their mean into a bias.

    A column j of o or down scores var(x_j) sum_i W_ij^2 (WIFV), in the dense model; that of o is squared once more.
    Within each part the scores of columns are standardised to mean 0 and deviation 1; a unit has the mean of its
    columns. All units compete, each taking as much of the budget as it has parameters; shape uniform removes the same
    number in every block instead.

    bias: true adds W times the mean of what was removed to the bias of o and down, which get one where they have none
        (plain transformers cannot load that of LLaMA then). With compensate it is least squares that finds the biases.

    Source: An et al. 2024, Fluctuation-based adaptive structured pruning for large language models, arXiv:2312.11983.
    Cost: one pass over the dense model.
    """
    found = torch.zeros(len(units))
    means: dict[str, Tensor] = {}  # of what enters each part's output linear in the dense model, (in,)
    for block, parts, seen in walked(context.through(), units, team=context.team):
        for number, part in parts.items():
            found[units.part == number] = _fluctuations(block.linears[str(part.output)], part, seen[str(part.output)])
        means |= {name: each.mean.float().cpu() for name, each in seen.items()}
    return Decision(found, biases=partial(biases, context.blocks, units, means=means))


def biases(blocks: Sequence[Block], units: Units, kept: Tensor, *, means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new biases (out,), by their names in the model, of linears that lose some, not all, of what they read.

    means: of what enters each part's output linear in the dense model, (in,) by its name
    """
    changed = {}
    for part, mask in zip(units.parts, units.split(kept.bool()), strict=True):
        if mask.all() or not mask.any():  # a part without units is gone, and its bias with it
            continue
        linear, columns = blocks[part.block].linears[str(part.output)], part.columns[~mask].flatten()
        bias = linear.weight[:, columns].float() @ means[linear.name][columns]
        own: Any = getattr(linear.module, "bias", None)
        if own is not None:
            bias += own.detach().float()
        changed[f"{linear.name}.bias"] = bias.to(linear.weight.dtype)
    return changed


def _fluctuations(linear: Linear, part: Part, seen: Moments) -> Tensor:
    """The standardised scores (count,) of a part's units."""
    columns = (seen.variance * linear.weight.float().square().sum(0)).cpu().double()  # (in,)
    if part.kind == "heads":
        columns = columns.square()
    columns = (columns - columns.mean()) / columns.std().clamp(min=torch.finfo(torch.float64).tiny)
    return columns[part.columns].mean(1).float()
