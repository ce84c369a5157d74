"""REAP: experts by the router's weight times the size of what they give."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, scores
from sparsekit.model.structure import Units
from sparsekit.walk import by_expert


@scores("experts", shape="uniform")
@torch.no_grad()
def reap(context: Context, units: Units, *, remove: float) -> Tensor:
    """Remove the experts that add least to the hidden states where they are used.

    The mean, over the tokens that are sent to an expert, of the router's weight times the norm of the expert's output
    (Eq. 9); 0 for an expert that no token is sent to. As many go from each block.

    Source: Lasby et al. 2025, REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, arXiv:2510.13999.
    Cost: one pass over the dense model.
    """
    return by_expert(context.through(), units, context.team, "mean")
