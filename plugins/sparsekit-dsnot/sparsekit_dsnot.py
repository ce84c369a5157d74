"""DSnoT: dynamic sparse no training, as a sparsekit plugin."""

import torch
from sparsekit.maths import NM, Norms, Pattern
from sparsekit.solvers.wanda import wanda
from torch import Tensor


@torch.no_grad()
def dsnot(
    weight: Tensor,
    stats: Norms,
    pattern: Pattern,
    init: Tensor | None = None,
    *,
    cycles: int = 50,
    tolerance: float = 5e-5,
    power: float = 1.0,
) -> Tensor:
    """Exchange kept and pruned weights of a row until its mean output is the dense one; kept weights stay as they are.

    With the mean token m and e = sum over the pruned of W_j m_j, a cycle brings back the pruned weight of largest
    sign(e) W_j m_j / var_j^power and removes the kept one of smallest |W_j| ||x_j|| among those with
    sign(e) W_j m_j < 0; then e follows. No weight moves twice. For n:m both are of one group (without a weight to
    remove there the cycle passes), and a row stops when e changes its sign.

    init: an answer whose zeros are the first mask; Wanda's mask without.
    tolerance: a row stops at |e| below it; the published 0.1 is for sums over sequences of 2048 tokens.
    power: of the variance of the input; inputs that never change count as of the smallest variance above rounding.

    Source: Zhang et al. 2024, Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs. Here the variance
    is that of all tokens, not the mean of each batch's, and MLPs are treated like attention, unlike in the published
    code's defaults. Of a dense stream nothing is seen: the target is W x.
    Cost: no product; some ten passes over the weight a cycle, of the Gram only the diagonal.
    Raises ValueError for a weight or init that is not finite or does not fit the statistics or the pattern.
    """
    stats.check_weight(weight, init)
    pattern.check(stats.width, "this layer")
    if cycles < 1 or not tolerance >= 0:
        raise ValueError(f"cycles must be at least 1 and tolerance at least 0, not {cycles} and {tolerance}")
    if isinstance(pattern, NM) and (pattern.pairs or stats.width % pattern.group):
        raise ValueError(f"dsnot exchanges single weights within whole groups, which {pattern} does not leave as it is")
    group = pattern.group if isinstance(pattern, NM) else None
    kept = (wanda(weight, stats, pattern) if init is None else init) != 0
    effect = weight * stats.mean  # (out, in): what each weight adds to the mean output
    urge = effect / _variance(stats) ** power
    price = weight.abs() * stats.squares.sqrt()
    fresh, stay = ~kept, kept.clone()  # not yet brought back, not yet removed
    error = effect.masked_fill(kept, 0).sum(1, keepdim=True)  # (out, 1)
    first = error.sign()
    row = torch.arange(len(weight), device=weight.device)
    column = torch.arange(weight.shape[1], device=weight.device)
    for _ in range(cycles):
        sign = error.sign()
        active = error.abs() > tolerance
        if group is not None:
            active &= sign == first
        if not active.any():
            break
        most, back = torch.where(fresh & (effect * sign > 0), urge * sign, -torch.inf).max(1, keepdim=True)
        removable = stay & (effect * sign < 0)
        if group is not None:
            removable &= column // group == back // group
        least, away = torch.where(removable, price, torch.inf).min(1, keepdim=True)
        brought = (active & (most > -torch.inf)).squeeze(1)
        swapped = brought & (least < torch.inf).squeeze(1)
        fresh[row[brought], back[brought, 0]] = False
        u, p, which = back[swapped, 0], away[swapped, 0], row[swapped]
        kept[which, u], kept[which, p], stay[which, p] = True, False, False
        error[which, 0] += effect[which, p] - effect[which, u]
    return weight.masked_fill(~kept, 0)


dsnot.memory = (7, 0)  # type: ignore[attr-defined]  # see sparsekit.contracts.held


def _variance(stats: Norms) -> Tensor:
    """Of every input (in,), above zero."""
    square = stats.squares / max(1, stats.count)
    variance = square - stats.mean**2
    return torch.maximum(variance, torch.finfo(square.dtype).eps * square.clamp(min=1e-30))  # by column
