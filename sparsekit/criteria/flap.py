"""FLAP: channels and heads by how much their outputs fluctuate; what they are on average becomes a bias."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from sparsekit.model import Block, Linear
from sparsekit.model.structure import Part, Units, choose, share
from sparsekit.run import Work
from sparsekit.walk import Moments, Once, need, walked


def flap(
    work: Work,
    *,
    remove: str | float,
    shape: Literal["free", "uniform"] = "free",
    bias: bool = True,
    compensate: bool = False,
    damping: float = 0.01,
) -> tuple[LightningModule, Any, list[Callback]]:
    """Remove the KV groups and MLP channels that fluctuate least, and put their mean into a bias.

    A column j of o or down scores var(x_j) sum_i W_ij^2 (WIFV), in the dense model; that of o is squared once more.
    Within each part the scores of columns are standardised to mean 0 and deviation 1; a unit has the mean of its
    columns. All units compete, each taking as much of the budget as it has parameters.

    remove: share of the blocks' parameters, such as "30%"
    shape: free, as published; uniform removes the same number in every block
    bias: add W times the mean of what was removed to the bias of o and down, which get one where they have none (plain
        transformers cannot load that of LLaMA then); false leaves it off
    compensate: least squares instead, with biases unless `bias` is false; damping: of that

    Source: An et al. 2024, Fluctuation-based adaptive structured pruning for large language models, arXiv:2312.11983.
    """
    budgets = "joint" if shape == "free" else "separate"
    units, ending = work.removal(
        remove,
        ["heads", "channels"],
        compensate=compensate,
        bias=bias and compensate,
        damping=damping,
        shape=shape,
        budgets=budgets,
    )

    def decide(device: torch.device) -> dict[str, Any]:
        found, means = _measured(work, units, device)
        kept = choose(units, found, share(remove), shape=shape, budgets=budgets)
        changed = biases(work.blocks, units, kept, means) if bias and not compensate else {}
        return {"scores": found, "kept": kept, "changed": changed}

    return Once(decide), Once.data(), [ending]


def scores(work: Work, units: Units, remove: str | float, device: torch.device) -> Tensor:
    """The scores (units,) of heads and channels in the dense model, standardised part by part; higher is better.

    remove: of no influence here
    """
    return _measured(work, units, device)[0]


def biases(blocks: Sequence[Block], units: Units, kept: Tensor, means: dict[str, Tensor]) -> dict[str, Tensor]:
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


@torch.no_grad()
def _measured(work: Work, units: Units, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores (units,), and the mean inputs (in,) of each part's output linear by its name, on the CPU."""
    need(units, ("heads", "channels"), "flap")
    found = torch.zeros(len(units))
    means: dict[str, Tensor] = {}
    for block, parts, seen in walked(work.through(device), units, team=work.team):
        for number, part in parts.items():
            found[units.part == number] = _fluctuations(block.linears[str(part.output)], part, seen[str(part.output)])
        means |= {name: each.mean.float().cpu() for name, each in seen.items()}
    return found, means


def _fluctuations(linear: Linear, part: Part, seen: Moments) -> Tensor:
    """The standardised scores (count,) of a part's units."""
    columns = (seen.variance * linear.weight.float().square().sum(0)).cpu().double()  # (in,)
    if part.kind == "heads":
        columns = columns.square()
    columns = (columns - columns.mean()) / columns.std().clamp(min=torch.finfo(torch.float64).tiny)
    return columns[part.columns].mean(1).float()
