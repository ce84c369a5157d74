"""Gates in front of units: numbers that multiply what units give, and that gradients reach."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, put_forward
from sparsekit.model.structure.units import Units


@contextmanager
def gating(blocks: Sequence[Block], units: Units, device: torch.device) -> Iterator[Tensor]:
    """While this lasts, what each unit gives is multiplied by its gate: a leaf (units,) in float32, all 1 at first.

    A gate of 0 is what removing the unit is, but for the bias of an output linear of which nothing is left. A layer's
    gate multiplies what the layer adds to the hidden states. Change gates in place, without gradients.

    Raises:
        ValueError: units are experts, which have no gate but their router's.
    """
    if "experts" in units.kinds:
        raise ValueError("experts have no gates of this kind: their router weighs them; choose other units")
    gates = torch.ones(len(units), device=device, requires_grad=True)
    by_index = {block.index: block for block in blocks}
    undo: list[Callable[[], Any]] = []
    first = 0
    for part in units.parts:
        mine = slice(first, first + part.count)
        first += part.count
        block = by_index[part.block]
        if part.kind == "layers":
            around = partial(_around, gates, mine, block.module.forward)
            undo.append(put_forward(block.module, around))
            continue
        for name, columns in {str(part.output): part.columns, **part.readers}.items():
            hook = partial(_multiplied, gates, mine, columns)
            undo.append(block.linears[name].module.register_forward_pre_hook(hook).remove)
    try:
        yield gates
    finally:
        for each in reversed(undo):
            each()


def _multiplied(gates: Tensor, mine: slice, columns: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input of a linear that reads units, their columns (units, columns of each) multiplied by their gates."""
    columns = columns.to(gates.device)
    factors = gates.new_ones(columns.numel()).scatter(
        0, columns.flatten(), gates[mine].repeat_interleave(columns.shape[1])
    )
    return args[0] * factors.to(args[0].dtype), *args[1:]


def _around(gates: Tensor, mine: slice, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer makes of the hidden states, what it adds multiplied by its gate."""
    out = forward(*args, **kwargs)
    before = args[0] if args else kwargs["hidden_states"]
    after = out[0] if isinstance(out, tuple | list) else out
    mixed = before + gates[mine].to(after.dtype) * (after - before)
    return (mixed, *out[1:]) if isinstance(out, tuple | list) else mixed
