"""More sparsity the later a linear comes: an example of a sparsekit allocation rule."""

from typing import Annotated

from annotated_types import Ge, Le


def deeper(
    linears: dict[str, int], sparsity: float, *, slope: Annotated[float, Ge(0), Le(0.2)] = 0.05
) -> dict[str, float]:
    """Give the first linear `slope` less than the whole, the last one so much more; the total is conserved.

    slope: of the sparsity

    Source: an example, no paper.
    """
    total, before, given = sum(linears.values()), 0, {}
    for name, count in linears.items():
        given[name] = sparsity + slope * ((2 * before + count) / total - 1)  # its mean over weights is 0
        before += count
    return given
