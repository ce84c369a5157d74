"""Allocation that is linear in depth."""

import math
from typing import Annotated

from annotated_types import Gt, Lt

from sparsekit.maths import conserve


def depth(
    linears: dict[str, int],
    sparsity: float,
    groups: list[list[list[str]]],
    *,
    slope: Annotated[float, Gt(-1), Lt(1)] = 0.16,
) -> dict[str, float]:
    """Let the sparsity rise in equal steps from the first block to the last; the linears of a block have the same.

    s_b = s + slope (b / (blocks - 1) - mean), the mean weighted by parameters; cut to 0.01 .. 0.99, and what was cut is
    spread over the other blocks.

    slope: sparsity of the last block minus that of the first, above -1 and below 1; negative spares the last. The
        default is our choice, as wide as OWL's 2 lambda. The paper searches its common difference, slope / (blocks -
        1), so that no block leaves 0 .. 1: slope up to 2 min(s, 1 - s).

    Source: Huang et al. 2025, "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
    Perspective" (ATP), arXiv 2502.14770: an arithmetic progression, since errors of early blocks grow on their way.
    Cost: none.

    >>> depth({"a": 10, "b": 10, "c": 10}, 0.5, [[["a"]], [["b"]], [["c"]]], slope=0.25)
    {'a': 0.375, 'b': 0.5, 'c': 0.625}
    """
    if not (math.isfinite(slope) and -1 < slope < 1):
        raise ValueError(f"slope is {slope}, a difference of sparsities; give a number above -1 and below 1")
    step = slope / max(1, len(groups) - 1)
    wanted = {name: step * index for index, block in enumerate(groups) for group in block for name in group}
    return conserve(wanted, linears, sparsity)
