"""SparseGPT: optimal brain surgeon, one column at a time."""

import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from sparsekit.maths import NM, SMALLEST, Pattern, Quantization, Stats, ends_on_grid
from sparsekit.solvers.strips import prune_strip

_STRIP = 16  # columns that are updated one by one before a matrix product updates the rest of their block
_LARGEST_DAMPING = 1e4


@ends_on_grid(lambda options: options["quantize"])
@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    *,
    block: Annotated[int, Ge(1)] = 128,
    damping: Annotated[float, Ge(0)] = 0.01,
    quantize: dict[str, Any] | None = None,
) -> Tensor:
    """Prune column by column; after each, move the later columns of its row to make up for what was lost.

    With H = gram + damping * mean(diag(gram)) * I and U the upper Cholesky factor of its inverse (H^-1 = U'U), removing
    w_j costs w_j^2 / U_jj^2 and the best answer to it is W[:, j:] -= w_j / U_jj * U[j, j:]. Unstructured masks are
    chosen for each block of columns, over all rows jointly, from the weights as they are when the block is reached; n:m
    masks when the group is reached, those of pairs by what removing both costs. Inputs that are always zero get weight
    zero.

    With a dense stream the start is not W but the least-squares answer to its target,
    W + W drift_cross H^-1 = argmin ||V x - W x_d||^2 + ridge ||V - W||^2, for which the same U holds.

    block: columns whose mask is chosen together; rounded up to a multiple of the group for n:m.
    damping: in units of the mean diagonal. Raised tenfold, with a warning, until the Cholesky factor exists.
    quantize: {bits, group, symmetric, clip} of sparsekit.grid.Quantization: the answer lies on the integer grid of the
        dense weight. When its column comes, a kept weight goes to the nearest value q of the grid, which may be 0, and
        w_j - q is made up for by later columns just as the w_j of pruned ones.

    Source: Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, alg. 1;
    with quantize its section 3.5.
    Cost: O(in^3 + out in^2) and two more matrices of the Gram's size; the factor is shared by linears of one input.
    Raises ValueError for a weight that is not finite or does not fit the statistics or the pattern, and for options
    out of range.
    """
    stats.check_weight(weight)
    pattern.check(stats.width, "this layer")
    if block < 1 or not damping >= 0:
        raise ValueError(f"block must be at least 1 and damping at least 0, not {block} and {damping}")
    nearest = None if quantize is None else Quantization.of(quantize).fit(weight).rounder()
    upper, used = stats.cached(("sparsegpt", damping), lambda: factor(stats.gram, damping))
    if used != damping:
        warnings.warn(
            f"the Gram (width {stats.width}, {stats.count} tokens) has no Cholesky factor with damping {damping:g}; "
            f"damping {used:g} was used",
            stacklevel=2,
        )
    start = weight.to(stats.gram)
    if stats.drift_cross is not None:
        start = start + (start @ stats.drift_cross) @ upper.t() @ upper
    columns = start.t().clone(memory_format=torch.contiguous_format)  # (in, out): a column in one piece
    columns[stats.gram.diagonal() == 0] = 0
    _prune(columns, upper, pattern, block, nearest)
    if not columns.isfinite().all():
        raise ValueError(
            "the answer contains NaN or Inf, since weights and inputs are too large for products in float32; "
            "look at the block before, or leave this layer out"
        )
    return columns.t().contiguous().to(weight.dtype)


sparsegpt.memory = (2.5, 1.1)  # type: ignore[attr-defined]  # see contracts.held
sparsegpt.rows_apart = lambda pattern, options: isinstance(pattern, NM)  # type: ignore[attr-defined]  # see maths.rows_apart


def factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """U with (gram + damping)^-1 = U'U and the damping that it took.

    Reversed in both directions, the Cholesky factor L of the Gram gives U = L^-1 reversed back: no explicit inverse.
    """
    diagonal = gram.diagonal()
    mean, live = diagonal.mean(), diagonal.where(diagonal != 0, 1).flip(0)
    while damping <= _LARGEST_DAMPING:
        lower = gram.flip(0, 1).t()  # symmetric: .t() only gives the memory order in which LAPACK works in place
        lower.diagonal().copy_(live + damping * mean)
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if info == 0:
            inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device).t()
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(0, 1), damping
        damping = damping * 10 or 1e-4
    raise ValueError("the Gram is not positive semi-definite with any damping; are the inputs finite?")


def _prune(
    columns: Tensor,
    upper: Tensor,
    pattern: Pattern,
    block: int,
    nearest: Callable[[int, Tensor], Tensor] | None,
) -> None:
    """Prune `columns` (in, out) in place, and round what is kept by `nearest(j, column)`."""
    group, keep = (pattern.group, pattern.kept) if isinstance(pattern, NM) else (1, 0)
    end = pattern.whole(len(columns)) if isinstance(pattern, NM) else len(columns)  # what follows stays dense
    if isinstance(pattern, NM) and pattern.pairs:  # chosen group by group, as an unstructured mask block by block
        block, group = group, 1
    block = max(block, SMALLEST) if columns.shape[1] == 1 else block  # a column of one weight could give up nothing
    block, strip = (-(-size // group) * group for size in (block, _STRIP))  # rounded up to whole groups
    width, pivot = len(columns), upper.diagonal().unsqueeze(1)  # (in, 1)
    scale = torch.zeros_like(columns[:block])  # 1 / U_jj where pruned, else 0
    errors = torch.empty_like(scale)

    def choose(first: int, last: int, into: Tensor) -> None:
        score = columns[first:last] / pivot[first:last]
        if isinstance(pattern, NM) and pattern.pairs:  # what the second costs once the first is gone and made up for
            beside = upper.diagonal(1)[first : last - 1 : 2].unsqueeze(1)
            score[1::2] -= score[::2] * beside / pivot[first + 1 : last : 2]
        score.square_()
        if isinstance(pattern, NM):
            pruned = pattern.lowest(score)
        else:
            pruned = pattern.keep(score.t(), per="matrix", checked=True).logical_not_().t()
        torch.div(pruned, pivot[first:last], out=into)

    def round_and_prune(left: int, right: int, scale: Tensor, errors: Tensor) -> None:
        for j in range(left, right):
            i = j - left
            if group > 1 and i % group == 0:
                choose(j, j + group, scale[i : i + group])
            rounded = nearest(j, columns[j]).masked_fill_(scale[i] != 0, 0)  # type: ignore[misc]
            error = torch.sub(columns[j], rounded, out=errors[i]).div_(pivot[j])
            columns[j] = rounded
            columns[j + 1 : right].addr_(upper[j, j + 1 : right], error, alpha=-1)

    for first in range(0, end, block):
        last = min(first + block, end)
        if group == 1:
            choose(first, last, scale[: last - first])
        for left in range(first, last, strip):
            right = min(left + strip, last)
            own, done = (each[left - first : right - first] for each in (scale, errors))
            if nearest is None:
                corner = upper[left:right, left:right]
                prune_strip(columns[left:right], corner, own, done, keep, group if group > 1 else 0)
            else:
                round_and_prune(left, right, own, done)
            columns[right:last].addmm_(upper[left:right, right:last].t(), done, alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].t(), errors[: last - first], alpha=-1)
        columns[first:last].masked_fill_(scale[: last - first] != 0, 0)
    if nearest is not None and end < width:
        group = 1
        round_and_prune(end, width, torch.zeros_like(columns[end:]), torch.empty_like(columns[end:]))
