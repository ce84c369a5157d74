"""Refit: the best weights on a support that another solver has chosen."""

import warnings
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from sparsekit.maths import Pattern, Ridge, Stats, row_totals

PIECE = 2**23  # weights that are fitted at once


@torch.no_grad()
def refit(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    init: Tensor,
    *,
    damping: Annotated[float, Ge(0)] | None = None,
    ridge: Ridge = "mean",
    iterations: Annotated[int, Ge(1)] = 100,
    tolerance: Annotated[float, Ge(0)] = 1e-3,
) -> Tensor:
    """Minimise ||V x - W x_d||^2 + sum r_j (V_ij - W_ij)^2 over V with the zeros of `init`, starting from it.

    Conjugate gradients with the diagonal as preconditioner, projected on the support, all rows at once. What is zero in
    `init` stays zero, bit for bit; `pattern` is not looked at. No row ends above its start in this objective.

    damping: of the ridge r, in units of the diagonal of the Gram; null: 1.5 / tokens an input, from 0.05 to
        0.3. A whole row fitted at once overfits where tokens are few.
    ridge: see `Stats.ridge`
    iterations: at most; a warning says when the tolerance was not reached.
    tolerance: a row stops once an iteration lowers its objective by less than this fraction of it.

    Source: the mask of any paper, least squares on its support; ALPS (Meng et al. 2024) ends with the same system.
    Cost: one product (out, in) x (in, in) an iteration. Raises ValueError for a weight or init that is not finite or
    does not fit the statistics.
    """
    stats.check_weight(weight, init)
    if (damping is not None and not damping >= 0) or iterations < 1 or not tolerance >= 0:
        raise ValueError(
            "damping and tolerance must be at least 0 and iterations at least 1, "
            f"not {damping}, {tolerance} and {iterations}"
        )
    if weight.numel() > PIECE:  # every row is a problem of its own
        pieces = zip(*(matrix.split(max(1, PIECE // weight.shape[1])) for matrix in (weight, init)), strict=True)
        options = {"damping": damping, "ridge": ridge, "iterations": iterations, "tolerance": tolerance}
        return torch.cat([refit(rows, stats, pattern, first, **options) for rows, first in pieces])  # type: ignore[arg-type]
    gram, dense, answer = stats.gram, weight.to(stats.gram), init.to(stats.gram, copy=True)
    support = init != 0
    diagonal = gram.diagonal()
    added = stats.ridge(damping, ridge)  # (in,)
    precondition = 1 / (diagonal + added).where(diagonal + added > 0, 1)
    pull = 0 if stats.drift_cross is None else dense @ stats.drift_cross  # (out, in)
    constant = 0 if stats.drift_gram is None else row_totals(dense @ stats.drift_gram * dense)

    def damped(rows: Tensor) -> Tensor:
        return torch.addmm(rows * added, rows, gram)

    def objective(product: Tensor) -> Tensor:
        return row_totals((answer - dense) * (product - 2 * pull))  # (out, 1)

    product = damped(answer - dense)
    start = objective(product)
    left = start + constant  # (out, 1): every row is a problem of its own, and ends by itself
    smallest = torch.finfo(gram.dtype).eps * left
    active = torch.ones_like(left, dtype=torch.bool)
    residual = (pull - product).mul_(support)
    direction = residual * precondition
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        product = damped(direction).mul_(support)
        step = _ratio(slope, (direction * product).sum(1, keepdim=True)) * active
        answer.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        gain = step * slope
        left = left - gain
        active &= gain > torch.maximum(tolerance * left, smallest)
        if not active.any():
            break
        scaled = residual * precondition
        previous, slope = slope, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(_ratio(slope, previous)).add_(scaled)
    else:
        warnings.warn(
            f"refit stopped after {iterations} iterations, the last of which lowered the objective of "
            f"{int(active.sum())} of {len(active)} rows by up to {float((gain / left.clamp(min=1e-300)).max()):.1e} of "
            f"it (tolerance {tolerance:g}); raise iterations, tolerance or damping",
            stacklevel=2,
        )
    better = objective(damped(answer - dense)) <= start  # rounding can undo a row that had nothing to gain
    return answer.where(better & support, init.to(answer).where(support, 0)).to(weight.dtype)


def numbers_held(out: int, width: int) -> float:
    """The float32 numbers that `refit` holds for a weight (out, width)."""
    return min(9 * out * width, 2 * out * width + 9 * PIECE)


refit.memory = numbers_held  # type: ignore[attr-defined]  # see contracts.held


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0)
