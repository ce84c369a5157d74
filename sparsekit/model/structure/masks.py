"""A model that runs as if some of its units were removed; no weight is copied or changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, put_forward
from sparsekit.model.structure.experts import with_fewer
from sparsekit.model.structure.units import Units


class Masked:
    """Hooks that silence units. `masked(kept)` sets the mask of the next forward passes; use it in `masking`.

    entering: block's index -> the hidden states (sequences, length, hidden) that entered it in the last forward pass,
        while this is a dictionary
    """

    def __init__(self, units: Units, blocks: Mapping[int, Block]):
        self.units, self.blocks = units, blocks
        self._undo: list[Callable[[], None]] = []
        self.kept: list[Tensor | None] = [None] * len(units.parts)  # of each part; None: all are kept
        self.entering: dict[int, Tensor] | None = None
        self.begun: tuple[int, Tensor] | None = None

    def begin(self, block: int | None, hidden: Tensor | None = None) -> None:
        """Have the next forward passes begin at a block, with what enters it: those before are passed over.

        None: at the first block again.
        """
        self.begun = None if block is None or hidden is None else (block, hidden)

    def __call__(self, kept: Tensor) -> None:
        """Keep the units where `kept` (units,) is true or 1."""
        parts = self.units.split(kept.bool())
        self.kept = [None if bool(each.all()) else each for each in parts]
        self.restore()
        for part, each in zip(self.units.parts, self.kept, strict=True):
            if part.experts is not None and each is not None:
                block = self.blocks[part.block]
                home = part.home.removeprefix(f"{block.name}.")
                self._undo.append(with_fewer(block, home, part.experts, each))

    def restore(self) -> None:
        """Have the routers know all experts again."""
        while self._undo:
            self._undo.pop()()

    def silence(self, number: int, columns: Tensor, inputs: Tensor) -> Tensor | None:
        """What reads a part's units has those of removed ones set to zero in its input; None: as it is.

        columns: of the input, (units, columns of each)
        """
        kept = self.kept[number]
        if kept is None or not kept.any():
            return None
        factors = torch.zeros(inputs.shape[-1], device=inputs.device, dtype=inputs.dtype)
        factors[columns[kept.to(columns.device)].flatten().to(inputs.device)] = 1
        return inputs * factors

    def size(self, number: int) -> float:
        """What a norm over all units multiplies its input by, and then divides its result by.

        So it gives what it would give if it read those that are left alone: its mean would be over fewer entries.
        """
        kept = self.kept[number]
        return 1.0 if kept is None or not kept.any() else (len(kept) / float(kept.sum())) ** 0.5


@contextmanager
def masking(blocks: Sequence[Block], units: Units) -> Iterator[Masked]:
    """While this lasts, the model of these blocks runs under the mask that was set last (all kept at first).

    Layers, and attentions and MLPs of which nothing is left, are passed over, so that a mask costs what the model that
    it stands for costs.
    """
    by_index = {block.index: block for block in blocks}
    masked = Masked(units, by_index)
    undo: list[Callable[[], Any]] = []
    for number, part in enumerate(units.parts):
        block = by_index[part.block]
        if part.kind == "layers":
            undo.append(_replaced(block.module, partial(_around_layer, masked, number, block.tuple_length)))
            continue
        if part.experts is not None:
            continue
        assert part.output is not None
        linear = block.linears[part.output].module
        undo.append(linear.register_forward_hook(_silent(masked, number)).remove)
        for name, columns in {part.output: part.columns, **part.readers, **part.norms}.items():
            module = block.module.get_submodule(name.removeprefix(f"{block.name}."))
            norm = name in part.norms
            undo.append(module.register_forward_pre_hook(_columns(masked, number, columns, norm)).remove)
            if norm:
                undo.append(module.register_forward_hook(_normalised(masked, number)).remove)
        home = part.output.removeprefix(f"{block.name}.").rpartition(".")[0]
        if home:  # a module of its own: the attention, the MLP
            undo.append(_replaced(block.module.get_submodule(home), _Around(masked, number)))
    for block in blocks:
        undo.append(_replaced(block.module, partial(_around_block, masked, block.index, block.tuple_length)))
    try:
        yield masked
    finally:
        masked.restore()
        for each in reversed(undo):
            each()


def _replaced(module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """Have `around(forward, *args, **kwargs)` called in place of a module's forward; what is given back undoes it."""
    return put_forward(module, partial(around, module.forward))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _as_returned(hidden: Tensor, length: int) -> Any:
    """What a module returns whose first result this is. length: of its tuple, 0 where it returns none"""
    return (hidden, *[None] * (length - 1)) if length else hidden


def _around_layer(
    masked: Masked, number: int, length: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A layer that is gone gives what it is given."""
    if masked.kept[number] is None:
        return forward(*args, **kwargs)
    return _as_returned(_hidden(args, kwargs), length)


def _around_block(
    masked: Masked, index: int, length: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Before the block with which a forward pass begins nothing is computed."""
    if masked.begun is not None:
        first, entering = masked.begun
        if index < first:
            return _as_returned(_hidden(args, kwargs), length)
        if index == first and args:
            args = (entering, *args[1:])
        elif index == first:
            kwargs = kwargs | {"hidden_states": entering}
    if masked.entering is not None:
        masked.entering[index] = _hidden(args, kwargs)
    return forward(*args, **kwargs)


class _Around:
    """A module of which nothing is left gives zeros; the first time it is run, and seen to give them."""

    def __init__(self, masked: Masked, number: int):
        self.masked, self.number = masked, number
        self.length: int | None = None  # of the tuple that it returns, 0 where it is none; -1: it gives something else

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = self.masked.kept[self.number]
        if kept is None or self.length == -1 or kept.any():
            return forward(*args, **kwargs)
        if self.length is not None:
            return _as_returned(torch.zeros_like(_hidden(args, kwargs)), self.length)
        out = forward(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        alone = bool(args or "hidden_states" in kwargs) and first.shape == _hidden(args, kwargs).shape
        self.length = -1 if not alone or first.any() else len(out) if isinstance(out, tuple) else 0
        return out


def _columns(masked: Masked, number: int, columns: Tensor, norm: bool) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        silenced = masked.silence(number, columns, args[0])
        return None if silenced is None else (silenced * masked.size(number) if norm else silenced, *args[1:])

    return hook


def _normalised(masked: Masked, number: int) -> Any:
    return lambda _, args, out: out if masked.size(number) == 1 else out / masked.size(number)


def _silent(masked: Masked, number: int) -> Any:
    """Without any unit a part is silent: the bias of its output linear is gone too."""

    def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        kept = masked.kept[number]
        return torch.zeros_like(out) if kept is not None and not kept.any() else None

    return hook
