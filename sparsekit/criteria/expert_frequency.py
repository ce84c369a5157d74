"""Experts by how many tokens are sent to them."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, scores
from sparsekit.model.structure import Units
from sparsekit.walk import by_expert


@scores("experts", shape="uniform")
@torch.no_grad()
def expert_frequency(context: Context, units: Units, *, remove: float) -> Tensor:
    """Remove the experts that the fewest tokens are sent to, as many from each block.

    Source: the baseline of Lasby et al. 2025, REAP the Experts, arXiv:2510.13999.
    Cost: one pass over the dense model.
    """
    return by_expert(context.through(), units, context.team, "count")
