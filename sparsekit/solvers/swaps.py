"""Swaps: a better support for the dense weights, exchanging one kept and one pruned weight of a row at a time."""

import warnings
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from sparsekit.maths import NM, PANEL, Pattern, Stats


@torch.no_grad()
def swaps(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    init: Tensor,
    *,
    candidates: Annotated[int, Ge(1)] = 4,
    steps: Annotated[int, Ge(1)] = 100,
    tolerance: Annotated[float, Ge(0)] = 1e-3,
) -> Tensor:
    """Lower ||V x - W x_d||^2 over supports with as many weights in every row as `init` has; V = W on the support.

    With D = W - V and C = D G + W drift_cross, bringing back u and removing p changes the loss of a row by
        w_u^2 G_uu - 2 w_u C_u + w_p^2 G_pp + 2 w_p C_p - 2 w_u w_p G_up,
    after which C += w_p G_p - w_u G_u. In every step every row takes the best of the pairs it looked at, if that lowers
    its loss; for n:m both are of one group. Kept weights stay as they are: put `refit` after it.

    candidates: weights to bring back that are tried with all weights to remove in a step: those that lower the loss
        most by themselves. For n:m all pairs of a group are tried.
    steps: swaps a row, at most; a warning says how many rows could have gone on.
    tolerance: a row stops when the best swap lowers its loss by less than this fraction of it.

    Source: the 1-swap neighbourhood of SparseSwaps (2025), with our own search in it.
    Cost: 2 products (out, in) x (in, in), or 4 with a dense stream, and for each step of a row 2 + candidates rows of
    the Gram (n:m: the group's blocks of it). Raises ValueError for a weight or init that is not finite or does not fit.
    """
    stats.check_weight(weight, init)
    pattern.check(stats.width, "this layer")
    if candidates < 1 or steps < 1 or not tolerance >= 0:
        raise ValueError(
            "candidates and steps must be at least 1 and tolerance at least 0, "
            f"not {candidates}, {steps} and {tolerance}"
        )
    if isinstance(pattern, NM) and (pattern.pairs or stats.width % pattern.group):
        raise ValueError(f"swaps exchanges single weights within whole groups, which {pattern} does not leave as it is")
    group = pattern.group if isinstance(pattern, NM) else None
    gram, dense = stats.gram, weight.to(stats.gram)
    kept, unfinished = init != 0, 0
    size = max(1, PANEL // (stats.width * (group or candidates)))
    for rows, mask in zip(dense.split(size), kept.split(size), strict=True):
        pull = None if stats.drift_cross is None else rows @ stats.drift_cross
        constant = 0.0 if stats.drift_gram is None else (rows @ stats.drift_gram * rows).sum(1)
        best, more = _refine(rows, mask, gram, pull, constant, candidates, group, steps, tolerance)
        mask.copy_(best)
        unfinished += more
    if unfinished:
        warnings.warn(
            f"swaps stopped {unfinished} of {len(dense)} rows after {steps} swaps; raise steps or tolerance",
            stacklevel=2,
        )
    return weight.masked_fill(~kept, 0)


swaps.memory = (1.5, 7)  # type: ignore[attr-defined]  # see contracts.held


def _refine(
    rows: Tensor,
    kept: Tensor,
    gram: Tensor,
    pull: Tensor | None,
    constant: Tensor | float,
    candidates: int,
    group: int | None,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """A mask like `kept` (r, in) of lower loss for `rows` (r, in), and how many rows were stopped by `steps`."""
    residual, start = _loss(rows, kept, gram, pull)
    best, left = kept.clone(), start + constant
    smallest = 4 * torch.finfo(gram.dtype).eps * left
    alone = rows**2 * gram.diagonal()
    blocks = None if group is None else _blocks(gram, group)
    active, w, c, mask = torch.arange(len(rows), device=rows.device), rows, residual, kept.clone()
    for _ in range(steps):
        slope = 2 * w * c
        back = (alone - slope).masked_fill_(mask | (w == 0), torch.inf)  # to bring back a zero would change the count
        away = (alone + slope).masked_fill_(~mask, torch.inf)
        if blocks is None:
            gain, u, p = _best_pair(w, back, away, gram, min(candidates, w.shape[1]))
        else:
            gain, u, p = _best_pair_in_group(w, back, away, blocks)
        go = gain < -torch.maximum(tolerance * left, smallest)
        if not go.all():
            best[active] = mask
            active, w, c, mask, alone = active[go], w[go], c[go], mask[go], alone[go]
            left, smallest, gain, u, p = left[go], smallest[go], gain[go], u[go], p[go]
        if not len(active):
            break
        row = torch.arange(len(active), device=u.device)
        mask[row, u], mask[row, p] = True, False
        c += w[row, p, None] * gram[p] - w[row, u, None] * gram[u]
        left = left + gain
    best[active] = mask
    better = _loss(rows, best, gram, pull)[1] <= start  # rounding
    return best.where(better.unsqueeze(1), kept), len(active)


def _loss(rows: Tensor, kept: Tensor, gram: Tensor, pull: Tensor | None) -> tuple[Tensor, Tensor]:
    """C (r, in), and the loss (r,) without the part that no mask changes."""
    gone = rows.masked_fill(kept, 0)
    product = gone @ gram
    if pull is None:
        return product, (gone * product).sum(1)
    return product + pull, (gone * (product + 2 * pull)).sum(1)


def _best_pair(w: Tensor, back: Tensor, away: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The change of the loss, u and p (r,) of the best pair of the `count` best u and any p."""
    value, u = back.topk(count, dim=1, largest=False)  # (r, count)
    change = gram[u].mul_(w.unsqueeze(1)).mul_(-2 * w.gather(1, u).unsqueeze(2))  # (r, count, in)
    change += away.unsqueeze(1)
    least, p = change.min(2)
    gain, which = (least + value).min(1, keepdim=True)
    return gain.squeeze(1), u.gather(1, which).squeeze(1), p.gather(1, which).squeeze(1)


def _best_pair_in_group(w: Tensor, back: Tensor, away: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same among all pairs within one group; `blocks` (in / group, group, group)."""
    size = blocks.shape[1]
    w, back, away = (x.unflatten(1, (-1, size)) for x in (w, back, away))
    change = blocks * (-2 * w).unsqueeze(3) * w.unsqueeze(2)  # (r, in / group, u, p)
    change += back.unsqueeze(3)
    change += away.unsqueeze(2)
    gain, which = change.flatten(1).min(1)
    first = which // size**2 * size
    return gain, first + which // size % size, first + which % size


def _blocks(gram: Tensor, size: int) -> Tensor:
    return gram.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
