"""Allocation by the loss: what removing weights of each linear costs, as the gradients of one backward pass tell."""

import math
import warnings
from collections.abc import Iterable
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from sparsekit.maths import Allocation

LEVELS = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # sparsities at which a linear's cost is computed
STEP = 0.005  # between them it is read off a curve, at every such sparsity


def sensitivity(
    linears: dict[str, int],
    sparsity: float,
    curvature: Iterable[tuple[str, Tensor, Tensor, Tensor]],
    *,
    spread: Annotated[float, Gt(0), Le(0.5)] = 0.3,
    rows: bool = True,
) -> Allocation:
    """Remove most where the loss rises least: each linear gets its own sparsity, their total cost is the least.

    A change D of a linear's weight changes the loss, to second order, by about 1/2 sum_i g_i (D H D^T)_ii, where H is
    the Gram matrix of its inputs and g_i the mean square of the loss's gradient with respect to output i: the Fisher
    information with inputs and gradients independent (Kronecker-factored). D is what Wanda would remove, at nine
    sparsities; in between the cost's logarithm is interpolated. The sum of all linears' costs at the total that is
    asked is made the least by one price for a weight (Lagrange), which is exact where the curves are convex.

    spread: no linear is further from the whole's sparsity, nor beyond 0.05 and 0.95
    rows: within a linear rows count by the root of their g_i too, where the solver weighs rows against one another
        (sparsegpt, alps, fista, lamp's, not wanda) and the pattern lets it (a share, not n:m): while it is solved a row
        is multiplied by the fourth root of g_i over its mean. Not where a stage quantizes

    Linears of which no token came by (experts) get the whole's sparsity. For text alone.

    Source: ours, of the Kronecker-factored Fisher information (Martens and Grosse 2015, arXiv 1503.05671) and Wanda's
    scores (Sun et al. 2023, arXiv 2306.11695).
    Cost: a forward and a backward pass of 32,768 tokens (16 sequences at least), block by block, and nine products of
    weight and Gram matrix.
    """
    if not 0 < spread <= 0.5:
        raise ValueError(f"spread is {spread}, how far from the whole's a linear's sparsity may be; give at most 0.5")
    low, high = max(LEVELS[0], sparsity - spread), min(LEVELS[-1], sparsity + spread)
    if not low < sparsity < high:
        warnings.warn(f"a sparsity of {sparsity} leaves sensitivity no choice: all get the same", stacklevel=2)
        return Allocation(dict.fromkeys(linears, sparsity), {})
    at = torch.arange(low, high + STEP / 2, STEP, dtype=torch.float64)
    known: dict[str, Tensor] = {}
    importance: dict[str, Tensor] = {}
    for name, weight, gram, gradients in curvature:
        known[name] = _costs(weight, gram, gradients)
        if rows and gradients.any():
            importance[name] = gradients.cpu()
    unknown = [name for name, costs in known.items() if not costs[-1] > 0]
    if unknown:
        warnings.warn(
            f"no token of the text came by {len(unknown)} linears, {unknown[0]} the first: they get {sparsity:.4g}",
            stacklevel=2,
        )
    names = [name for name in linears if name not in set(unknown)]
    if not names:
        return Allocation(dict.fromkeys(linears, sparsity), {})
    counts = torch.tensor([linears[name] for name in names], dtype=torch.float64)
    costs = torch.stack([_between(known[name], at) for name in names])  # (linears, sparsities)
    goal = sparsity * float(counts.sum())

    def cheapest(price: float) -> Tensor:
        """Each linear's sparsity where its cost, less the price of what is removed, is the least."""
        return at[(costs - price * counts[:, None] * at).argmin(1)]

    least, most = -100.0, 100.0  # exponents of the price
    for _ in range(100):
        middle = (least + most) / 2
        removed = float((cheapest(math.exp(middle)) * counts).sum())
        least, most = (middle, most) if removed < goal else (least, middle)
    fewer, more = cheapest(math.exp(least)), cheapest(math.exp(most))  # they differ in a linear or two, by one step
    below, above = (float((each * counts).sum()) for each in (fewer, more))
    share = (goal - below) / ((above - below) or 1)
    given = fewer + share * (more - fewer)
    each = dict.fromkeys(linears, sparsity) | dict(zip(names, given.tolist(), strict=True))
    return Allocation(each, importance)


def _costs(weight: Tensor, gram: Tensor, gradients: Tensor) -> Tensor:
    """What the loss rises by, up to a factor that all linears share, at each of LEVELS (levels,), in float64.

    weight: (out, in); gram: (in, in); gradients: (out,)
    """
    order = (weight.abs() * gram.diagonal().clamp_min(0).sqrt()).argsort(1)
    found = []
    for level in LEVELS:
        removed = torch.zeros_like(weight)
        gone = order[:, : round(level * weight.shape[1])]
        removed.scatter_(1, gone, weight.gather(1, gone))
        errors = ((removed @ gram) * removed).sum(1)
        found.append(float(errors.clamp_min(0).double() @ gradients.double()))
    return torch.tensor(found, dtype=torch.float64)


def _between(costs: Tensor, at: Tensor) -> Tensor:
    """The costs at other sparsities than LEVELS, by lines between their logarithms."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    logs = costs.clamp_min(float(costs[-1]) * 1e-12).log()
    right = torch.searchsorted(levels, at.contiguous()).clamp(1, len(levels) - 1)
    share = (at - levels[right - 1]) / (levels[right] - levels[right - 1])
    return (logs[right - 1] + share * (logs[right] - logs[right - 1])).exp()
