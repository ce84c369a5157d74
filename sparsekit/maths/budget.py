"""The total of an allocation, kept exactly: no rule, but what rules end with."""

from typing import NamedTuple

from torch import Tensor


class Allocation(NamedTuple):
    """What a rule may give in place of sparsities: these, and what an error in each of a linear's outputs counts.

    sparsity: linear's name -> from 0 to below 1
    rows: linear's name -> (out,), at least 0, in any unit: where a pattern lets rows give up different shares of their
        weights, those of rows that count less go first; a linear that is absent has rows that count alike
    """

    sparsity: dict[str, float]
    rows: dict[str, Tensor]


def conserve(
    wanted: dict[str, float], linears: dict[str, int], sparsity: float, *, lowest: float = 0.01, highest: float = 0.99
) -> dict[str, float]:
    """The sparsities `wanted` + t, cut to [lowest, highest], with the one t that conserves the total.

    Only differences between the wanted values matter; what a bound cuts off is spread over the linears that are within
    bounds, by parameters. Linears that want the same get the same.

    wanted: name -> sparsity, up to a constant. linears: name -> number of parameters. sparsity: of the whole; a bound
    that it is beyond is moved to it.

    >>> conserve({"a": 0.0, "b": 0.2}, {"a": 300, "b": 100}, 0.5)
    {'a': 0.45, 'b': 0.65}
    >>> conserve({"a": 0.0, "b": 0.9}, {"a": 300, "b": 100}, 0.5, highest=0.8)
    {'a': 0.4, 'b': 0.8}
    """
    lowest, highest = min(lowest, sparsity), max(highest, sparsity)

    def cut(shift: float) -> dict[str, float]:
        return {name: min(highest, max(lowest, value + shift)) for name, value in wanted.items()}

    def removed(given: dict[str, float]) -> float:
        return sum(given[name] * count for name, count in linears.items())

    goal = sparsity * sum(linears.values())
    low, high = lowest - max(wanted.values()), highest - min(wanted.values())
    for _ in range(100):  # the total rises with the shift
        middle = (low + high) / 2
        low, high = (middle, high) if removed(cut(middle)) < goal else (low, middle)
    given = cut(high)
    free = [name for name in linears if lowest < given[name] < highest]
    if not free:
        return given
    bound = sum((given[name] - sparsity) * count for name, count in linears.items() if name not in set(free))
    mean = sum(wanted[name] * linears[name] for name in free) / sum(linears[name] for name in free)
    shift = sparsity - bound / sum(linears[name] for name in free) - mean  # exact where bisection is close
    return given | {name: min(highest, max(lowest, wanted[name] + shift)) for name in free}
