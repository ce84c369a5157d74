"""A model that runs as if some of its units were removed; no weight is copied or changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.structure.units import Part, Units


class Masked:
    """Hooks that silence units. `masked(kept)` sets the mask of the next forward passes; use it in `masking`."""

    def __init__(self, units: Units):
        self.units = units
        self.kept: list[Tensor | None] = [None] * len(units.parts)  # of each part; None: all are kept

    def __call__(self, kept: Tensor) -> None:
        """Keep the units where `kept` (units,) is true or 1."""
        parts = self.units.split(kept.bool())
        self.kept = [None if bool(each.all()) else each for each in parts]

    def silence(self, number: int, part: Part, inputs: Tensor) -> Tensor | None:
        """The input of a part's output linear with the columns of removed units set to zero; None: as it is."""
        kept = self.kept[number]
        if kept is None or not kept.any():
            return None
        columns = torch.zeros(part.columns.numel(), device=inputs.device, dtype=inputs.dtype)
        columns[part.columns[kept.to(part.columns.device)].flatten().to(inputs.device)] = 1
        return inputs * columns


@contextmanager
def masking(blocks: Sequence[Block], units: Units) -> Iterator[Masked]:
    """While this lasts, the model of these blocks runs under the mask that was set last (all kept at first)."""
    masked = Masked(units)
    by_index = {block.index: block for block in blocks}
    handles = []
    for number, part in enumerate(units.parts):
        block = by_index[part.block]
        if part.kind == "layers":
            handles.append(block.module.register_forward_hook(_skipped(masked, number), with_kwargs=True))
            continue
        assert part.output is not None
        linear = block.linears[part.output].module
        handles.append(linear.register_forward_pre_hook(_columns(masked, number, part)))
        handles.append(linear.register_forward_hook(_silent(masked, number)))
    try:
        yield masked
    finally:
        for handle in handles:
            handle.remove()


def _columns(masked: Masked, number: int, part: Part) -> Any:
    return lambda _, args: masked.silence(number, part, args[0])


def _silent(masked: Masked, number: int) -> Any:
    """Without any unit a part is silent: the bias of its output linear is gone too."""

    def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        kept = masked.kept[number]
        return torch.zeros_like(out) if kept is not None and not kept.any() else None

    return hook


def _skipped(masked: Masked, number: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if masked.kept[number] is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return hook
