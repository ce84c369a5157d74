"""ALPS: support and weights together, by ADMM with a rising penalty."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from sparsekit.maths import NM, Pattern, Ridge, Scope, Stats, thinned
from sparsekit.solvers.refit import numbers_held, refit

_EXACT = 2**16  # the largest matrix of which every support is exact; of others only the last
_THINNED = 17  # one in so many decides the threshold on the way
_EVERY = 3  # iterations between two looks at the support
_RAISE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # for a change above this fraction of the support, this factor
_LOWER, _SMALLEST, _LARGEST = 5.0, 1e-3, 1e6  # below that a Gram of low rank would have no inverse in float32
_SETTLED = (30, 3e-4)  # after so many iterations a change below this fraction of the support is the last


@torch.no_grad()
def alps(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    init: Tensor | None = None,
    *,
    damping: Annotated[float, Ge(0)] | None = None,
    ridge: Ridge = "mean",
    iterations: Annotated[int, Ge(1)] = 9,
    rho: Annotated[float, Gt(0)] = 0.5,
    pace: Annotated[float, Gt(0)] = 2.0,
    per: Scope = "matrix",
) -> Tensor:
    """Minimise ||V x - W x_d||^2 + sum r_j (V_ij - W_ij)^2 over support and weights, r from damping times diag(gram).

    In units where the damped Gram H has diagonal 1, and with B the linear term, ADMM on V = D, D with the pattern:
        V = (B - Y + rho D) (H + rho)^-1;  D = the largest of |V + Y / rho|, the rest 0;  Y += rho (V - D).
    Every third iteration rho rises by 1.3, 1.2 or 1.1 to the power of pace, the more the support still moves; if it has
    not moved before rho ever rose, rho falls to a fifth and all starts again. The largest of the last V are the
    support, on which `refit` then finds the weights: kept weights change.

    init: an earlier answer to start from in place of W; the result is another one, not always a better one.
    damping: the paper's is 0.01; null: 1.5 / tokens an input, from 0.01 to 0.3, as the support is fitted to the
        calibration tokens as well, and to few of them too closely: see methods.md. ridge: see `Stats.ridge`
    iterations, rho, pace: the paper's are 300, 0.1 and 1, which stop by themselves after 30 to 40 iterations and lower
        the error on other tokens by 1.5 percent more in over three times the time.
    per: where weights compete: "matrix" (the paper's), "row", or a number of columns.

    Source: Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs, alg. 1. The paper
    has one eigendecomposition for every rho; a Cholesky inverse for each is less work and gives the same iterates.
    Cost: an inverse (in^3 / 2 multiply-adds) every third iteration, one product (out, in) x (in, in) and one selection
    an iteration (in a large matrix with a threshold from a sample, except for the last), and refit: some 20 products.
    Memory: four more matrices of the Gram's size, six of the weight's.
    Raises ValueError for a weight or init that is not finite or does not fit the statistics or the pattern.
    """
    stats.check_weight(weight, init)
    pattern.check(stats.width, "this layer")
    if (damping is not None and not damping >= 0) or iterations < 1 or not rho > 0 or not pace > 0:
        raise ValueError(
            "damping must be at least 0, iterations at least 1, rho and pace above 0, "
            f"not {damping}, {iterations}, {rho} and {pace}"
        )
    added = stats.ridge(damping, ridge)  # (in,)
    damped, norm = stats.cached(("alps", damping, ridge), lambda: _normalised(stats.gram, added))
    dense = weight.to(stats.gram)
    linear = stats.target(dense).addcmul_(dense, added).div_(norm)  # (out, in)
    start = (dense if init is None else init.to(dense)) * norm
    first = stats.cached(("alps", damping, ridge, rho), lambda: _inverse(damped, rho))
    free = _admm(start, linear, damped, first, pattern, iterations, rho, pace, per)
    del start, linear, dense, first  # refit needs the room
    kept = free.masked_fill_(~pattern.keep(free.abs(), per=per), 0).div_(norm)
    del free
    return refit(weight, stats, pattern, kept.to(weight.dtype), damping=damping, ridge=ridge)


def _memory(out: int, width: int) -> float:
    grams, size = width**2, out * width
    return max(7.5 * size + 4.1 * grams, size + numbers_held(out, width) + 2.1 * grams)


alps.memory = _memory  # type: ignore[attr-defined]  # see contracts.held


def _admm(
    start: Tensor,
    linear: Tensor,
    damped: Tensor,
    inverse: Tensor,
    pattern: Pattern,
    iterations: int,
    rho: float,
    pace: float,
    per: Scope,
) -> Tensor:
    """The last V, in normalised units. inverse: of `damped` with the first rho"""
    sparse, dual = start, torch.zeros_like(start)
    before, raised = None, False
    free = start
    for iteration in range(1, iterations + 1):
        del free
        free = torch.sub(linear, dual).add_(sparse, alpha=rho) @ inverse
        point = dual.div_(rho).add_(free)
        del sparse
        support = _largest(point.abs(), pattern, per)
        sparse = point * support
        dual = point.sub_(sparse).mul_(rho)
        before = support if before is None else before
        if iteration % _EVERY or iteration == iterations:
            continue
        moved = int((support ^ before).sum()) / max(1, int(support.sum()))
        before = support
        if (raised and moved == 0) or (iteration > _SETTLED[0] and moved < _SETTLED[1]):
            break
        if raised or moved > _RAISE[1][0]:
            factor = next(factor for above, factor in _RAISE if moved > above)
            rho, raised = min(rho * factor**pace, _LARGEST), True
        elif rho <= _SMALLEST:
            break
        else:  # so strong a penalty that the first support never moved
            rho, before, sparse, dual = max(rho / _LOWER, _SMALLEST), None, start, torch.zeros_like(start)
        inverse = _inverse(damped, rho)
    return free


def _largest(score: Tensor, pattern: Pattern, per: Scope) -> Tensor:
    """The support on the way: of a large matrix up to a threshold from a sample, as selecting is half of the work."""
    if per != "matrix" or isinstance(pattern, NM) or score.numel() <= _EXACT:
        return pattern.keep(score, per=per)
    sample = thinned(score, score.numel() // _THINNED)
    return score > sample.kthvalue(max(1, pattern.pruned(len(sample)))).values


def _normalised(gram: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """H (in, in), the damped Gram with diagonal 1, and the norms (in,) by which it was divided on both sides."""
    diagonal = gram.diagonal() + added
    norm = diagonal.sqrt() + 1e-8
    damped = gram / norm
    damped.div_(norm.unsqueeze(1)).diagonal().copy_(diagonal / norm**2)
    return damped, norm


def _inverse(damped: Tensor, rho: float) -> Tensor:
    shifted = damped.clone()
    shifted.diagonal().add_(rho)
    factor = torch.linalg.cholesky(shifted)
    del shifted
    return torch.cholesky_inverse(factor)
