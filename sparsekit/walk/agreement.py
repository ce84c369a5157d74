"""Whether walking from block to block is the model's own forward pass: looked at once, before anything is pruned."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model import RAISED, Block, filled, filled_in_turn, first_inputs, parts_of, perceives, run_model

TOKENS = 128  # of the sequence that is looked at
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative difference of hidden states; else 2e-2


@torch.no_grad()
def check_walk(model: nn.Module, blocks: list[Block], tokens: Tensor) -> None:
    """Compare the hidden states after every block with those of the model's own forward pass.

    tokens: (sequences, length), of which the first is taken, or pixels

    Raises:
        ValueError: they differ by more than rounding: something passes between blocks that is not carried.
    """
    sample = tokens[:1] if tokens.is_floating_point() else tokens[:1, :TOKENS]
    own: dict[int, Tensor] = {}

    def keep(index: int, out: Any) -> None:
        own[index] = out[0] if isinstance(out, tuple | list) else out

    hooks = [
        block.module.register_forward_hook(lambda _, args, out, index=block.index: keep(index, out)) for block in blocks
    ]
    try:
        with filled_in_turn(blocks):
            run_model(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        for part in parts_of(blocks):
            _check_part(model, blocks, part, sample, own)
    except torch.OutOfMemoryError:
        raise
    except RAISED as error:
        if not perceives(model):  # text models are known through and through: it is a defect
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be walked through from block to block ({reason}), so it is not pruned yet"
        ) from error


def _check_part(
    model: nn.Module, blocks: list[Block], part: list[Block], sample: Tensor, own: dict[int, Tensor]
) -> None:
    with filled_in_turn(blocks[: part[0].index]):
        hidden = next(first_inputs(model, part, sample, 1))
    for block in part:
        if block.bridge is not None:
            hidden = block.bridge(hidden)
        with filled([block]):
            hidden, expected = block(hidden), own.pop(block.index)
        if not expected.isfinite().all():  # of which more is said where it matters
            return
        apart = float((hidden.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
        if apart <= ALLOWED.get(expected.dtype, 2e-2):
            continue
        if block.number is None:
            raise ValueError(
                f"the convolution {block.name} is given more than what the block before it gives (behind it values "
                f"differ by {apart:.2%}), so it cannot be pruned in a walk: name it in `ignore`"
            )
        raise ValueError(
            f"walked from block to block, {type(model).__name__} does not compute what it does by itself: after "
            f"{block.name} hidden states differ by {apart:.2%}. Something passes between its blocks that "
            "sparsekit does not carry, so it cannot be pruned block by block"
        )
