"""One pass over the dense model, for allocation rules that look at its weights and activations."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit.model import Block, filled, first_inputs, parts_of
from sparsekit.system import ActivationStore


@torch.no_grad()
def weights_and_norms(
    model: nn.Module,
    blocks: list[Block],
    tokens: Tensor,
    *,
    batch: int = 1,
    budget: int = 4 * 10**9,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every linear's name, weight (out, in) and the norm of each of its inputs (in,), block after block, in float32.

    A norm is the root of the sum of squares over `tokens` (sequences, length). Blocks compute on `device`, one at a
    time, and go back where they were; the model is not changed. batch, budget, folder: see `BlockStream.over`.

    Raises:
        ValueError: weights or activations are not finite.
    """
    if len(parts_of(blocks)) > 1:
        raise ValueError("a decoder reads what the encoder gives, so one dense pass cannot go over both")
    store = ActivationStore(budget, folder)
    try:
        for hidden in first_inputs(model, blocks, tokens, batch):
            store.append(hidden)
        for block in blocks:
            block.enter(store)
            with filled([block]):
                home = block.device
                for experts in block.experts.values():
                    experts.tokens = store.rows
                try:
                    squares = _advance(block.to(device), store)
                    for group, names in enumerate(block.groups):
                        for name in names:
                            weight = block.linears[name].weight.float()
                            if not (weight.isfinite().all() and squares[group].isfinite().all()):
                                raise ValueError(
                                    f"the weight of {name} or the activations entering it contain NaN or Inf; "
                                    "run the model in float32 or bfloat16, or repair the checkpoint"
                                )
                            yield name, weight, squares[group].sqrt()
                finally:
                    block.to(home)
    finally:
        store.close()


def _advance(block: Block, store: ActivationStore) -> dict[int, Tensor]:
    """Turn a block's inputs into the next one's; the sum of squares of every input column (in,), for each group."""
    squares: dict[int, Tensor] = {}

    def see(group: int, inputs: Tensor) -> None:
        added = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        squares[group] = squares[group] + added if group in squares else added

    with block.watching(range(len(block.groups)), see):
        for index, chunk in enumerate(store):
            store[index] = block(chunk)
    return squares
