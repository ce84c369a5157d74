"""OWL: outlier weighed layerwise sparsity."""

import warnings
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor

from sparsekit.maths import conserve, total


def owl(
    linears: dict[str, int],
    sparsity: float,
    groups: list[list[list[str]]],
    dense: Iterable[tuple[str, Tensor, Tensor]],
    *,
    threshold: Annotated[float, Gt(0)] = 5.0,
    spread: Annotated[float, Ge(0), Le(0.5)] = 0.08,
) -> dict[str, float]:
    """Spare the blocks with many outliers; the linears of a block have the same sparsity.

    D_b is the share of Wanda's scores |W_ij| ||x_j|| of block b, all its linears together, that are above threshold
    times their mean, in the dense model. s_b = s - 2 spread ((D_b - min D) / (max D - min D) - mean), the mean weighted
    by parameters (the paper's blocks are of one size); cut to 0.01 .. 0.99, and what was cut is spread over the others.

    threshold: M, above 0.
    spread: lambda, from 0 to 0.5: sparsities lie within 2 lambda. With n:m, a block moves to another n from half of
        1/m on. The paper counts its lambda for n:m in kept weights of a group: its 2, with M 6, is spread 2/m, so 0.25
        for groups of 8.

    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", sec. 3, arXiv 2310.05175; M = 5, lambda = 0.08 is its setting for LLaMA.
    Cost: a forward pass of the calibration tokens through the dense blocks; one block's scores in memory.
    """
    if not 0 < threshold < float("inf"):
        raise ValueError(f"threshold is {threshold}, a multiple of the mean score; give a number above 0, such as 5")
    if not 0 <= spread <= 0.5:
        raise ValueError(f"spread is {spread}, half of the range of sparsities; give a number from 0 to 0.5")
    index = {name: number for number, block in enumerate(groups) for group in block for name in group}
    outliers = {
        block: _outliers([weight.abs() * norms for _, weight, norms in members], threshold)
        for block, members in groupby(dense, key=lambda each: index[each[0]])
    }
    least, most = min(outliers.values()), max(outliers.values())
    if least == most:
        warnings.warn(
            f"owl finds as many scores above {threshold} times their mean in one block as in another, so all get the "
            "same sparsity; give another threshold",
            stacklevel=2,
        )
    unit = 2 * spread / ((most - least) or 1)
    return conserve({name: -unit * (outliers[index[name]] - least) for name in linears}, linears, sparsity)


def _outliers(scores: list[Tensor], threshold: float) -> float:
    """The share of scores (out, in), (out, in) ... above `threshold` times the mean of them all."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(total(score)) for score in scores) / count
    return sum(int((score > threshold * mean).count_nonzero()) for score in scores) / count
