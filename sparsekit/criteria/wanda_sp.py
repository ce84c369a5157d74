"""Wanda-sp: channels and heads by the size of their weights times that of their activations."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, scores
from sparsekit.model import Block, Linear
from sparsekit.model.structure import Part, Units, choose, masking
from sparsekit.walk import Moments, walked


@scores("heads", "channels", "mamba", removes=("heads", "channels"), shape="uniform", reads=("text", "images"))
@torch.no_grad()
def wanda_sp(context: Context, units: Units, *, remove: float) -> Tensor:
    """Remove the KV groups and MLP channels whose outputs weigh least, the same share in every block.

    A column j of o or down scores the mean over rows of |W_ij| times the size of its input; a unit scores the sum over
    its columns. Blocks are masked one after another by the published rule, `remove` of each block's own parameters, so
    that later ones see what the pruned ones give. As published the shape is uniform; free ranks the units of all blocks
    against one another, whose scores differ in scale.

    Source: An et al. 2024, Fluctuation-based adaptive structured pruning (Wanda-sp is its baseline), arXiv:2312.11983.
    Cost: two passes over the blocks.
    """
    found = torch.zeros(len(units))
    kept = torch.ones(len(units), dtype=torch.bool)
    with masking(context.blocks, units) as mask:
        for block, parts, seen in walked(context.through(), units, masked=True, team=context.team):
            for number, part in parts.items():
                found[units.part == number] = sizes(block.linears[str(part.output)], part, seen[str(part.output)])
            if not parts:
                continue
            mine = units.block == block.index
            kept[mine] = _within(block, list(parts.values()), found[mine], remove)
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
