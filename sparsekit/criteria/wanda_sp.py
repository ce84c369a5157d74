"""Wanda-sp: channels and heads by the size of their weights times that of their activations."""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from sparsekit.model import Block, Linear
from sparsekit.model.structure import Part, Units, choose, masking, share
from sparsekit.run import Work
from sparsekit.walk import Moments, Once, need, walked


def wanda_sp(
    work: Work,
    *,
    remove: str | float,
    shape: Literal["free", "uniform"] = "uniform",
    compensate: bool = False,
    bias: bool = False,
    damping: float = 0.01,
) -> tuple[LightningModule, Any, list[Callback]]:
    """Remove the KV groups and MLP channels whose outputs weigh least, the same share in every block.

    A column j of o or down scores the mean over rows of |W_ij| times the size of its input; a unit scores the sum over
    its columns. Blocks are pruned one after another, so that later ones see what the pruned ones give.

    remove: share of the blocks' parameters, such as "30%"
    shape: uniform, as published; free ranks the units of all blocks against one another, whose scores differ in scale
    compensate: make up for what is removed by least squares; bias: also by biases (loads then only where the family
        has them); damping: of that

    Source: An et al. 2024, Fluctuation-based adaptive structured pruning (Wanda-sp is its baseline), arXiv:2312.11983.
    """
    units, ending = work.removal(
        remove, ["heads", "channels"], shape=shape, compensate=compensate, bias=bias, damping=damping
    )
    return Once(partial(scores, work, units, remove)), Once.data(), [ending]


@torch.no_grad()
def scores(work: Work, units: Units, remove: str | float, device: torch.device) -> Tensor:
    """The scores (units,) of heads and channels, or of whole attentions and MLPs; higher is better.

    Every block is pruned by the published rule, `remove` of its own parameters, before the next one is looked at.
    """
    need(units, ("heads", "channels", "attention", "mlp"), "wanda-sp")
    found = torch.zeros(len(units))
    kept = torch.ones(len(units), dtype=torch.bool)
    with masking(work.blocks, units) as mask:
        for block, parts, seen in walked(work.through(device), units, masked=True, team=work.team):
            for number, part in parts.items():
                found[units.part == number] = sizes(block.linears[str(part.output)], part, seen[str(part.output)])
            mine = units.block == block.index
            kept[mine] = _within(block, list(parts.values()), found[mine], share(remove))
            mask(kept)
    return found


def sizes(linear: Linear, part: Part, seen: Moments) -> Tensor:
    """What the units of a part (count,) weigh in its output: mean |W_ij| times the root mean square of x_j, summed."""
    columns = linear.weight.float().abs().mean(0) * seen.size.to(linear.weight.device)  # (in,)
    return columns[part.columns.to(columns.device)].sum(1).cpu()


def _within(block: Block, parts: list[Part], scores: Tensor, remove: float) -> Tensor:
    """The block's own mask: the share of its parameters goes."""
    total = sum(parameter.numel() for parameter in block.module.parameters())
    return choose(Units(tuple(parts), total), scores, remove, shape="uniform")
