"""RIA: relative importance and activations, as a sparsekit plugin."""

import torch
from sparsekit.maths import Norms, Pattern, Scope
from torch import Tensor


def ria(weight: Tensor, stats: Norms, pattern: Pattern, *, power: float = 0.5, per: Scope = "matrix") -> Tensor:
    """Keep weights that matter to both their row and their column, scaled by the input norm.

    The score is (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||x_j||^power; kept weights stay as they are.

    power: exponent on the input norm; 0 ignores activations.
    per: where weights compete: "matrix" (as published), "row", or a number of columns.

    Source: Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models.
    Cost: one selection; of the Gram only the diagonal is used.
    """
    stats.check_weight(weight)
    size = weight.abs()  # (out, in)
    smallest = torch.finfo(size.dtype).tiny  # a row or column of zeros has no importance, not an undefined one
    relative = size / size.sum(0).clamp(min=smallest) + size / size.sum(1, keepdim=True).clamp(min=smallest)
    return weight.masked_fill(~pattern.keep(relative * stats.squares ** (power / 2), per=per), 0)


ria.memory = (5, 0)  # type: ignore[attr-defined]  # see sparsekit.contracts.held
