"""Wanda: weights and activations."""

from typing import Literal

import torch
from torch import Tensor

from sparsekit.maths import NM, Norms, Pattern, Scope


def wanda(weight: Tensor, stats: Norms, pattern: Pattern, *, per: Scope | Literal["share"] = "row") -> Tensor:
    """Keep the weights of largest |W_ij| ||x_j|| in every output row and leave them as they are.

    per: where weights compete: "row" (the paper's), "matrix", a number of columns, or "share": over the matrix, each in
        units of its row, so that every row loses the same share of the sum of its scores and other rows lose more
        weights than others. That is `--use_variant` of the published code, which searches the share until the sparsity
        is within .001; here the count is exact. An n:m pattern has no choice, whatever this is.

    Source: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, eq. 1; the share is in
    its code alone.
    Cost: one selection, with "share" a sort; no Gram matrix is needed. Raises ValueError for a weight that is not
    finite or does not fit the statistics, and for inputs that are not finite.
    """
    stats.check_weight(weight)
    score = weight.abs() * stats.squares.sqrt()  # (out, in)
    if per == "share":
        per = "matrix"
        score = score if isinstance(pattern, NM) else _shares(score)
    return weight.masked_fill(~pattern.keep(score, per=per), 0)


def _shares(score: Tensor) -> Tensor:
    """Of every score, what it and the lower ones of its row (of equal ones, the earlier) are of the row's sum."""
    sums, order = score.sort(dim=1, stable=True)
    sums.cumsum_(1)
    return score.scatter_(1, order, sums.div_(sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)))


wanda.memory = (4, 0)  # type: ignore[attr-defined]  # see contracts.held
wanda.rows_apart = lambda pattern, options: isinstance(pattern, NM) or options.get("per", "row") == "row"  # type: ignore[attr-defined]
