"""Quantize: the weights that an earlier solver kept, on a grid of a few bits."""

import warnings
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from sparsekit.maths import Pattern, Quantization, Stats, ends_on_grid
from sparsekit.solvers.sparsegpt import factor

_BLOCK = 128  # columns between two settlements


@ends_on_grid(lambda options: {key: options[key] for key in ("bits", "group", "symmetric", "clip")})
@torch.no_grad()
def quantize(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    init: Tensor,
    *,
    bits: Annotated[int, Ge(2), Le(8)] = 8,
    group: int | Literal["channel"] = "channel",
    symmetric: bool = True,
    clip: bool = False,
    method: Literal["obs", "nearest"] = "obs",
    damping: Annotated[float, Ge(0)] = 0.01,
    settle: Annotated[int, Ge(0)] = 2,
) -> Tensor:
    """Put `init` on an integer grid, its zeros kept; each column's rounding is made up for by the kept ones after it.

    The grid (see sparsekit.grid) is that of `init`, fixed before anything is rounded, and zero is on it. Column by
    column, with H and U as in `sparsegpt`: round to nearest, then W[:, j:] -= error_j / U_jj * U[j, j:]. That lets
    pruned weights move too, so after every 128 columns they are set to 0 again and `settle` steps of conjugate
    gradients, on the kept weights that are not rounded yet, minimise ||V x - init x||^2 + ridge ||V - init||^2.
    A kept weight may round to 0: a zero more than the pattern asks for. Not the dense layer but `init` is the target,
    so that what a recovery stage has found is not undone; the reported error is against the dense layer all the same.

    bits, group, symmetric, clip: the grid, see sparsekit.grid.Quantization; group: input columns or "channel".
    method: "obs" as above; "nearest": only round.
    damping: as in `sparsegpt`.
    settle: steps after every block of columns; 0 only zeroes the pruned weights when their column is reached.

    Source: Frantar et al. 2022, GPTQ, alg. 1, with the support of any paper; the settling is ours.
    Cost: as `sparsegpt` without its choice, and (settle + 1) in / 128 products (out, rest) x (rest, rest): about
    in / 128 whole ones. Raises ValueError for a weight or init that is not finite or does not fit the statistics, a
    group that does not divide the width, and options out of range.
    """
    stats.check_weight(weight, init)
    kind = Quantization(bits, group, symmetric, clip)
    kind.columns(stats.width)
    if method not in ("obs", "nearest") or not damping >= 0 or settle < 0:
        raise ValueError(
            f'method must be "obs" or "nearest", damping and settle at least 0, not {method!r}, {damping} and {settle}'
        )
    grid = kind.fit(init)
    if method == "nearest":
        return grid.nearest(init).to(weight.dtype)
    upper, used = stats.cached(("sparsegpt", damping), lambda: factor(stats.gram, damping))
    if used != damping:
        warnings.warn(
            f"the Gram (width {stats.width}, {stats.count} tokens) has no Cholesky factor with damping {damping:g}; "
            f"damping {used:g} was used",
            stacklevel=2,
        )
    gram, nearest = stats.gram, grid.rounder()
    ridge = float(used * gram.diagonal().mean())
    columns = init.to(gram).t().clone(memory_format=torch.contiguous_format)  # (in, out): a column in one piece
    kept = columns != 0
    for first in range(0, len(columns), _BLOCK):
        last = min(first + _BLOCK, len(columns))
        errors = torch.empty_like(columns[first:last])
        for j in range(first, last):
            rounded = nearest(j, columns[j]).masked_fill_(~kept[j], 0)
            error = torch.sub(columns[j], rounded, out=errors[j - first]).div_(upper[j, j])
            columns[j] = rounded
            columns[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
        if settle and last < len(columns):
            _settle(columns[last:], kept[last:], gram[last:, last:], ridge, settle)
    return columns.t().contiguous().to(weight.dtype)


quantize.memory = (6.5, 2)  # type: ignore[attr-defined]  # see contracts.held


def _settle(columns: Tensor, kept: Tensor, gram: Tensor, ridge: float, steps: int) -> None:
    """Zero what is not kept, in place, and move the kept nearer to the least-squares answer under that.

    `columns` (rest, out) come as the answer without it, so what is zeroed is all that the residual comes from.
    """
    precondition = (1 / (gram.diagonal() + ridge).clamp(min=torch.finfo(gram.dtype).tiny)).unsqueeze(1)  # (rest, 1)
    gone = columns.masked_fill(kept, 0)
    columns.masked_fill_(~kept, 0)
    residual = torch.addmm(gone, gram, gone, beta=ridge).mul_(kept)
    direction = residual * precondition
    slope = (residual * direction).sum(0)  # (out,): every output is a problem of its own
    for _ in range(steps):
        product = torch.addmm(direction, gram, direction, beta=ridge).mul_(kept)
        step = _ratio(slope, (direction * product).sum(0))
        columns.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        scaled = residual * precondition
        previous, slope = slope, (residual * scaled).sum(0)
        direction.mul_(_ratio(slope, previous)).add_(scaled)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0)
