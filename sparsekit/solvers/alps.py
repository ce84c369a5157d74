"""ALPS: support and weights together, by ADMM with a rising penalty."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from sparsekit.maths import NM, Pattern, Ridge, Scope, Stats, thinned
from sparsekit.solvers.refit import PIECE, numbers_held, refit

_EXACT = 2**16  # the largest matrix of which every support is exact; of others only the last
_THINNED = 17  # one in so many decides the threshold on the way
_WIDE = 8192  # inputs up to which the first inverse is kept for other linears of the same
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
    ridge: Ridge = "root",
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
    damping: the paper's is 0.01; null: by the tokens an input, see `Stats.ridge`, as the support is fitted to the
        calibration tokens as well, and to few of them too closely. ridge: what an input's is in units of: mean (the
        paper's), column, or root, which lies between the two
    iterations, rho, pace: the paper's are 300, 0.1 and 1, which stop by themselves after 30 to 40 iterations and lower
        the error on other tokens by 1.5 percent more in over three times the time.
    per: where weights compete: "matrix" (the paper's), "row", or a number of columns.

    Source: Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs, alg. 1. The paper
    has one eigendecomposition for every rho; a Cholesky inverse for each is less work and gives the same iterates.
    Cost: an inverse (in^3 / 2 multiply-adds) every third iteration, one product (out, in) x (in, in) and one selection
    an iteration (in a large matrix with a threshold from a sample, except for the last), and refit: some 20 products.
    Memory: three more matrices of the Gram's size, five to eight of the weight's.
    Raises ValueError for a weight or init that is not finite or does not fit the statistics or the pattern.
    """
    stats.check_weight(weight, init)
    pattern.check(stats.width, "this layer")
    if (damping is not None and not damping >= 0) or iterations < 1 or not rho > 0 or not pace > 0:
        raise ValueError(
            "damping must be at least 0, iterations at least 1, rho and pace above 0, "
            f"not {damping}, {iterations}, {rho} and {pace}"
        )
    diagonal = stats.gram.diagonal() + stats.ridge(damping, ridge)  # (in,)
    norm = diagonal.sqrt() + 1e-8
    inverse = partial(_inverse, stats.gram, diagonal / norm**2, norm)
    dense = weight.to(stats.gram)
    linear = stats.target(dense).addcmul_(dense, stats.ridge(damping, ridge)).div_(norm)  # (out, in)
    start = partial(torch.mul, dense if init is None else init.to(dense), norm)
    first = None
    if stats.width <= _WIDE:  # linears of one input share it
        first = stats.cached(("alps", damping, ridge, rho), lambda: inverse(rho))
    free = _admm(start, linear, inverse, first, pattern, iterations, rho, pace, per)
    del start, linear, dense, first  # refit needs the room
    kept = free.masked_fill_(_largest(free, pattern, per, exactly=True).logical_not_(), 0).div_(norm)
    del free
    return refit(weight, stats, pattern, kept.to(weight.dtype), damping=damping, ridge=ridge)


def _memory(out: int, width: int) -> float:
    grams, size = width**2, out * width
    shared = width <= _WIDE  # the first inverse
    pieces = size if size <= PIECE else PIECE  # what is there twice for some of the rows at a time
    return max(
        5.3 * size + 2.2 * pieces + (2.1 + shared) * grams, size + numbers_held(out, width) + (0.1 + shared) * grams
    )


alps.memory = _memory  # type: ignore[attr-defined]  # see contracts.held


def _admm(
    start: Callable[[], Tensor],
    linear: Tensor,
    inverse_for: Callable[[float], Tensor],
    inverse: Tensor | None,
    pattern: Pattern,
    iterations: int,
    rho: float,
    pace: float,
    per: Scope,
) -> Tensor:
    """The last V, in normalised units. inverse_for: (H + rho)^-1 by rho; inverse: that for the first, if it is known

    Of D and Y their sum is kept, in `point` = V + Y / rho: where the support is true it is D, elsewhere Y over the rho
    of its making, which is `made`.
    """
    point, support, made = start(), torch.ones_like(linear, dtype=torch.bool), rho
    before, raised = None, False
    free = torch.empty_like(linear)
    for iteration in range(1, iterations + 1):
        inverse = inverse_for(rho) if inverse is None else inverse
        for rows in _pieces(linear):
            dual = point[rows].masked_fill(support[rows], 0).mul_(made)
            sparse = point[rows].mul_(support[rows])
            free[rows] = torch.sub(linear[rows], dual).add_(sparse, alpha=rho) @ inverse
            point[rows] = dual.div_(rho).add_(free[rows])
        support, made = _largest(point, pattern, per), rho
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
            rho, before, support = max(rho / _LOWER, _SMALLEST), None, torch.ones_like(support)
            point.copy_(start())
        inverse = None  # makes room for the next
    return free


def _largest(values: Tensor, pattern: Pattern, per: Scope, exactly: bool = False) -> Tensor:
    """The support of these values (out, in): of a large matrix, on the way, up to a threshold from a sample."""
    if isinstance(pattern, NM) or per == "row":
        return torch.cat([pattern.keep(values[rows].abs(), per=per) for rows in _pieces(values)])
    if per != "matrix" or exactly or values.numel() <= _EXACT:
        return pattern.keep(values.abs(), per=per)
    sample = thinned(values, values.numel() // _THINNED).abs()
    return values.abs() > sample.kthvalue(max(1, pattern.pruned(len(sample)))).values


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Its rows, some at a time where there are many."""
    step = max(1, PIECE // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _inverse(gram: Tensor, diagonal: Tensor, norm: Tensor, rho: float) -> Tensor:
    """(H + rho)^-1, H being the Gram divided by `norm` (in,) on both sides, with this diagonal (in,)."""
    shifted = gram / norm
    shifted.div_(norm.unsqueeze(1)).diagonal().copy_(diagonal + rho)
    factor = torch.linalg.cholesky(shifted)
    del shifted
    return torch.cholesky_inverse(factor)
