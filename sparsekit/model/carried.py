"""What blocks are given beside hidden states: masks, positions, per-layer inputs, keys and values of earlier blocks."""

from typing import Any

import torch
from torch import Tensor

Given = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments that follow the hidden states
Place = tuple[int, int]  # an output of a block: the block's index, and which of its outputs


class Carried:
    """Arguments of all blocks that depend on the text, by chunk. Those that do not are kept once, in the block.

    A mapping among the arguments is something that blocks write into for later ones (Gemma 3n's shared keys and
    values): every store of chunks has its own. What a block gives beside hidden states and a later one is given (T5's
    biases of positions) is kept for every chunk, and once where chunks have the same.
    """

    def __init__(self) -> None:
        self.arguments: dict[tuple[int, int], Given] = {}  # (block, chunk)
        self._written: dict[tuple[int, int], dict[Any, Any]] = {}  # (the mapping's id, the store's number)
        # a block's arguments that earlier blocks give, by place or name
        self.passed: dict[int, dict[int | str, Place]] = {}
        self._outputs: dict[tuple[Any, Place], Tensor] = {}  # (the chunk's place, of what)

    def keep(self, block: int, chunk: int, known: Given, given: Given) -> None:
        """Keep a chunk's arguments, unless they are what is known; equal tensors in them are kept once."""
        if not _same(known, given):
            self.arguments[block, chunk] = _merged(known, given)

    def of(self, block: int, hidden: Tensor, known: Given) -> Given:
        """The arguments for a chunk that comes from an `ActivationStore`; else those that are known."""
        place = getattr(hidden, "place", None)
        found = known if place is None else self.arguments.get((block, place[1]), known)
        found = found if place is None else self._with_own(found, place[0])
        if block not in self.passed:
            return found
        args, kwargs = list(found[0]), dict(found[1])
        for slot, source in self.passed[block].items():
            if isinstance(slot, int):
                args[slot] = self._outputs[place, source]
            else:
                kwargs[slot] = self._outputs[place, source]
        return tuple(args), kwargs

    def take(self, block: int, hidden: Tensor, out: Any) -> None:
        """Keep what a block gave for a chunk, as far as later ones are given it."""
        place = getattr(hidden, "place", None)
        for source in {each for slots in self.passed.values() for each in slots.values() if each[0] == block}:
            own = out[source[1]].detach().cpu()
            alike = next((each for (_, other), each in self._outputs.items() if other == source), None)
            self._outputs[place, source] = alike if alike is not None and _same(alike, own) else own

    def _with_own(self, value: Any, store: int) -> Any:
        """The same with the store's own mappings inside the arguments."""
        args, kwargs = value
        return tuple(self._own(item, store) for item in args), {k: self._own(item, store) for k, item in kwargs.items()}

    def _own(self, value: Any, store: int) -> Any:
        if not isinstance(value, dict):
            return value
        return self._written.setdefault((id(value), store), dict(value))


Known = dict[int, tuple[Tensor, Tensor]]  # the id of a tensor -> itself, and the same on a device


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None, known: Known | None = None) -> Any:
    """The tensors of a structure on a device, and those of floating point in `dtype` if it is given.

    known: those that are there already

    Mappings stay the objects that they are, so that what is written into them is found again; with a dtype they are
    copied.
    """
    if isinstance(value, Tensor):
        there = value if known is None else known.get(id(value), (value, value))[1]
        return there.to(device, dtype if value.is_floating_point() else None)
    if hasattr(value, "_fields"):  # a namedtuple
        return type(value)(*(moved(item, device, dtype, known) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device, dtype, known) for item in value)
    if isinstance(value, dict):
        found = {key: moved(item, device, dtype, known) for key, item in value.items()}
        if dtype is not None:
            return found
        value.update(found)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and torch.equal(a, b)))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(_same_inside(a[key], b[key]) for key in a)
    return type(a) is type(b)


def _same_inside(a: Any, b: Any) -> bool:
    """Of an argument: an empty mapping is there to be written into, and no two chunks share it."""
    return a != {} and _same(a, b) if isinstance(a, dict) else _same(a, b)


def _merged(known: Any, given: Any) -> Any:
    """What is given, with the tensors that are known where they are equal."""
    if isinstance(given, Tensor):
        return known if _same(known, given) else given
    if isinstance(given, tuple | list) and type(known) is type(given) and len(known) == len(given):
        merged = [_merged(x, y) for x, y in zip(known, given, strict=True)]
        return type(given)(*merged) if hasattr(given, "_fields") else type(given)(merged)
    if isinstance(given, dict) and given and isinstance(known, dict):
        return {key: _merged(known.get(key), item) for key, item in given.items()}
    return given
