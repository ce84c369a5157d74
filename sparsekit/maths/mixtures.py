"""n:m patterns of different n for one group size m, with exactly as many weights removed as by one n for all."""

import math
import warnings

import torch

from sparsekit.maths.budget import conserve
from sparsekit.maths.pattern import NM

SUMS = 5000  # either way, that the search looks at first
CELLS = 3 * 10**7  # of the largest table that it fills: some seconds


def mixture(
    fractions: dict[str, float], linears: dict[str, int], pattern: NM, together: list[list[str]]
) -> dict[str, NM]:
    """Round a rule's sparsities to multiples of 1/m, the number of removed weights that of `pattern` exactly.

    Every linear removes k of m, 1 <= k < m. Of all choices that conserve the total, the one with the least sum of
    parameters x (k - m fraction)^2, found by dynamic programming over the number of weights removed so far; where
    linears are of one size that is rounding by largest remainder. Linears of one block that the rule gives the same
    stay together if no k is then further than its two neighbours from what the rule wants, else each is rounded by
    itself.

    fractions: name -> sparsity, the total conserved. linears: name -> number of parameters. together: the names of each
    block.

    >>> blocks = [["a"], ["b"], ["c"]]
    >>> mixture({"a": 0.5, "b": 0.65, "c": 0.725}, dict.fromkeys("abc", 800), NM(3, 8), blocks)
    {'a': NM(keep=4, group=8), 'b': NM(keep=3, group=8), 'c': NM(keep=2, group=8)}
    """
    removed, group = pattern.group - pattern.kept, pattern.group
    if max(fractions.values()) - min(fractions.values()) < 1e-9:
        return dict.fromkeys(fractions, pattern)
    if pattern.pairs or pattern.slides:
        raise ValueError(f"allocation gives each linear its own n of m, and {pattern} has none but itself: use uniform")
    bounded = conserve(fractions, linears, pattern.sparsity, lowest=1 / group, highest=1 - 1 / group)
    alike: dict[tuple[int, float], list[str]] = {}
    for index, block in enumerate(together):
        for name in block:
            alike.setdefault((index, round(fractions[name], 9)), []).append(name)
    found: dict[str, NM] = {}
    for items in (list(alike.values()), [[name] for name in fractions]):
        sizes = [sum(linears[name] for name in item) for item in items]
        wanted = [group * bounded[item[0]] for item in items]
        chosen = _nearest(sizes, wanted, removed, group)
        if chosen is None:
            continue
        found = {name: NM(group - k, group) for item, k in zip(items, chosen, strict=True) for name in item}
        if all(abs(k - value) < 1 for k, value in zip(chosen, wanted, strict=True)):
            break
    if not found:
        warnings.warn(
            f"the linears' sizes have so little in common that no mixture of patterns with {group} was found that "
            f"removes as much as {pattern}: every linear gets {pattern}",
            stacklevel=2,
        )
    return {name: found.get(name, pattern) for name in fractions}


def _nearest(sizes: list[int], wanted: list[float], removed: int, group: int) -> list[int] | None:
    """The k, 1 <= k < group, with sum size (k - wanted)^2 least and sum size k = removed sum size; None: not found.

    First with every k and every sum on the way near what is wanted, then further off.
    """
    unit = math.gcd(*sizes)
    sizes = [size // unit for size in sizes]
    most = min(sum(sizes) * (group - 1), CELLS // len(sizes))
    for wider in (1, 8, 64):
        reach = min(most, wider * max(4 * max(sizes), SUMS))
        chosen = _path(sizes, wanted, removed, group, reach, 4 * wider)
        if chosen or (reach == most and 4 * wider >= group):
            return chosen
    return None


def _path(sizes: list[int], wanted: list[float], removed: int, group: int, reach: int, near: int) -> list[int] | None:
    """The same by dynamic programming, over k within `near` of what is wanted and sums within `reach` of it.

    State: the sum so far, less what is wanted so far; the middle of the table is 0.
    """
    cost = torch.full((2 * reach + 1,), math.inf, dtype=torch.float64)
    cost[reach] = 0
    ideal, before, table = 0.0, 0, []
    for position, (size, value) in enumerate(zip(sizes, wanted, strict=True)):
        ideal += size * value
        after = round(ideal) if position < len(sizes) - 1 else removed * sum(sizes)
        best, choice = torch.full_like(cost, math.inf), torch.zeros(len(cost), dtype=torch.int16)
        for k in range(max(1, math.floor(value) - near), min(group, math.ceil(value) + near + 1)):
            shift = size * k - (after - before)
            if abs(shift) <= 2 * reach:
                low, high = max(0, shift), len(cost) + min(0, shift)  # of the states that k leads to
                price = cost[low - shift : high - shift] + size * (k - value) ** 2
                better = price < best[low:high]
                best[low:high].copy_(torch.where(better, price, best[low:high]))
                choice[low:high].masked_fill_(better, k)
        table.append((choice, after - before))
        cost, before = best, after
    if math.isinf(cost[reach]):
        return None
    chosen, state = [], reach
    for (choice, step), size in zip(reversed(table), reversed(sizes), strict=True):
        chosen.append(int(choice[state]))
        state -= size * chosen[-1] - step
    return chosen[::-1]
