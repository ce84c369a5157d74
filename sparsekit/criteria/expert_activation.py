"""Experts by the sum of the norms of their outputs."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, scores
from sparsekit.model.structure import Units
from sparsekit.walk import by_expert


@scores("experts", shape="uniform")
@torch.no_grad()
def expert_activation(context: Context, units: Units, *, remove: float) -> Tensor:
    """Remove the experts whose outputs have the least norm, summed over the tokens sent to them.

    As many go from each block.

    Source: Jaiswal et al. 2025, Finding Fantastic Experts in MoEs (expert activation norm), arXiv:2504.05586.
    Cost: one pass over the dense model.
    """
    return by_expert(context.through(), units, context.team, "norms")
