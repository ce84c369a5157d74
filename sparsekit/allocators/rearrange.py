"""LAMP's sparsity rearrangement between and within blocks."""

from typing import Annotated

from annotated_types import Ge, Le

from sparsekit.maths import conserve


def rearrange(
    linears: dict[str, int],
    sparsity: float,
    groups: list[list[list[str]]],
    *,
    alpha: Annotated[float, Ge(0), Le(1)] = 0.7,
    beta: Annotated[float, Ge(0)] = 0.7,
) -> dict[str, float]:
    """Spare the last block, and in every block what comes first; remove more where it can be made up for.

    Between blocks: the last has none after it to make up for its errors and gets alpha s, the others share the rest by
    parameters (eq. 1, 2). Within a block of sparsity s: linears that read the block's normalised input (the first
    group: q, k, v; a fused qkv; in a parallel block fc1 too) get less, those that write its output (the last group:
    fc2, down) get more; all others s (eq. 3, 4). The paper's s (1 - b) and s (1 + b) conserve the total only if both
    have as many parameters. Here both sides move the same number of weights, s b times the smaller side's parameters:
    the smaller side gets the paper's sparsity exactly, the larger one less of a change. So no sparsity leaves 0 .. 1.
    Cut to 0.01 .. 0.99, and what was cut is spread over the others. Where experts are left dense the last group of a
    block is that of attention.

    alpha: from 0 to 1, which changes nothing; the paper's best are 0.6 to 0.75 for language models, 0.8 to 0.9 for
        vision.
    beta: b in units of 1 - s, with the s of the model; from 0, which changes nothing, to 1 / s, where the last linears
        of a block have none left. The paper's best are 0.6 to 0.8.

    Raises:
        ValueError: the other blocks cannot take over what the last one keeps.

    Source: LAMP, sec. 3.2 and 4.4.
    Cost: none.

    >>> rearrange({"qkv": 100, "o": 100, "fc2": 100}, 0.5, [[["qkv"], ["o"], ["fc2"]]], alpha=1, beta=0.5)
    {'qkv': 0.375, 'o': 0.5, 'fc2': 0.625}
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give a number from 0 to 1")
    if not 0 <= beta * sparsity <= 1:
        raise ValueError(f"beta is {beta}; at a sparsity of {sparsity:.4g} give a number from 0 to {1 / sparsity:.4g}")
    blocks = [block for block in groups if block]
    given: dict[str, float] = {}
    for block, share in zip(
        blocks, _between([_size(linears, block) for block in blocks], sparsity, alpha), strict=True
    ):
        given |= _within(block, linears, share, beta * (1 - sparsity))
    return conserve(given, linears, sparsity)


def _between(sizes: list[int], sparsity: float, alpha: float) -> list[float]:
    """Every block's sparsity."""
    if alpha == 1:
        return [sparsity] * len(sizes)
    if len(sizes) == 1:
        raise ValueError(f"alpha is {alpha}, but in a model of one block no other takes over; give alpha: 1")
    last, others = sizes[-1], sum(sizes[:-1])
    share = sparsity * (1 + last / others * (1 - alpha))
    if share >= 1:
        least = 1 - (1 / sparsity - 1) * others / last
        raise ValueError(
            f"alpha {alpha} at {sparsity:.4g} in total leaves the blocks before the last a sparsity of {share:.4g}, "
            f"which must be below 1; give alpha above {least:.4g}, or a lower sparsity"
        )
    return [share] * (len(sizes) - 1) + [sparsity * alpha]


def _within(block: list[list[str]], linears: dict[str, int], sparsity: float, change: float) -> dict[str, float]:
    """The sparsities of a block's linears; the smaller side's moves by the fraction `change` of itself."""
    given = {name: sparsity for group in block for name in group}
    if len(block) > 1:
        first, last = (_size(linears, [group]) for group in (block[0], block[-1]))
        moved = sparsity * change * min(first, last)
        given |= dict.fromkeys(block[0], sparsity - moved / first)
        given |= dict.fromkeys(block[-1], sparsity + moved / last)
    return given


def _size(linears: dict[str, int], groups: list[list[str]]) -> int:
    return sum(linears[name] for group in groups for name in group)
