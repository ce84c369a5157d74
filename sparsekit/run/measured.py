"""Patterns by allocation rules that look at the dense model: at its weights and inputs, or at its loss's gradients."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekit.maths import Pattern
from sparsekit.model import adopt, on_device
from sparsekit.run.allocation import allocate
from sparsekit.run.plan import Plan
from sparsekit.train import SEQUENCES, curvature
from sparsekit.walk import weights_and_norms

TOKENS = 32768  # of short sequences as many as this


def measured_patterns(planned: Plan, model: nn.Module, tokens: Tensor, folder: Path) -> dict[str, Pattern]:
    """The patterns by a rule that looks at the dense model: one pass of `tokens` (sequences, length) through it, or a
    pass there and back of its first sequences (`there_and_back`).

    folder: for activations beyond the recipe's budget.
    """
    blocks = adopt(model, planned.blocks)
    seen: Iterable[Any]
    if planned.postponed == "curvature":
        with on_device(model, blocks, planned.device):
            seen = curvature(model, blocks, tokens[: there_and_back(planned, tokens)], planned.device)
            return allocate(planned.recipe, planned.blocks, {"curvature": seen})
    seen = weights_and_norms(
        model,
        blocks,
        tokens,
        batch=planned.batch,
        budget=planned.memory[0],
        folder=folder,
        device=planned.device,
    )
    return allocate(planned.recipe, planned.blocks, {"dense": seen})


def there_and_back(planned: Plan, tokens: Tensor) -> int:
    """How many sequences a backward pass is made of: TOKENS of text, SEQUENCES at least, while there is room for them.

    What enters each block is kept in memory meanwhile, and the recipe's budget of activations is what there is.
    """
    wide = planned.config.hidden_size * planned.dtype.itemsize * (len(planned.blocks) + 4)
    length = tokens.shape[1]
    return max(1, min(max(SEQUENCES, TOKENS // length), planned.memory[0] // (wide * length)))
