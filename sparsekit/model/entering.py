"""What enters a model's blocks: in front of the first, and between two of them; and the model without them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, _Stop, put_forward, split_call
from sparsekit.model.carried import Carried
from sparsekit.model.discovery import run_model


@torch.no_grad()
def first_inputs(model: nn.Module, blocks: list[Block], tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """Hidden states that enter the first block, (batch, length, hidden) a chunk; fills every block's `arguments`.

    The model runs up to its blocks only: each block is passed over, the last one ends the pass, so this costs an
    embedding look-up. Arguments (masks, positions, rotary tables, caches off) differ by block in some families
    (Gemma), so they are kept for every block, once for each batch size. Where they depend on the text (per-layer
    inputs, the tokens themselves), they are kept for every chunk, by its number, in CPU memory.
    """
    caught: list[Tensor] = []

    def stand_in(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, kwargs = split_call(args, kwargs)
            # a cache that is given all the same would grow with every pass through the block
            kwargs = {key: None if hasattr(value, "get_seq_length") else value for key, value in kwargs.items()}
            rest, kwargs = _unmarked(block, rest, kwargs)
            known = block.arguments.setdefault(hidden.shape[0], (rest, kwargs))
            carried.keep(block.index, len(done), known, (rest, kwargs))
            if block is blocks[0]:
                caught.append(hidden)
            if block is blocks[-1]:
                raise _Stop
            marked = {place: hidden.new_empty(0) for place in block.passes}
            marks.update({id(mark): (mark, (block.index, place)) for place, mark in marked.items()})
            return _returned(block, block.scaled(hidden), marked)

        return forward

    def _unmarked(block: Block, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments without what earlier blocks gave, of which it is noted where it came from."""
        slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for slot, value in slots:
            if id(value) in marks:
                carried.passed.setdefault(block.index, {})[slot] = marks[id(value)][1]
        plain = tuple(None if id(value) in marks else value for value in args)
        return plain, {key: None if id(value) in marks else value for key, value in kwargs.items()}

    done: list[int] = []
    marks: dict[int, tuple[Tensor, tuple[int, int]]] = {}  # stands for an output of a block, by its id
    carried = Carried()
    for block in blocks:
        block.arguments.clear()
        block.carried = carried
        block.bridge = partial(_between, model, blocks, block, tokens.shape[1:]) if block.bridged else None
    for start in range(0, len(tokens), batch):
        undo = [put_forward(block.module, stand_in(block)) for block in blocks]
        try:
            run_model(model, tokens[start : start + batch], use_cache=False)
        except _Stop:
            pass
        finally:
            for each in undo:
                each()
        marks.clear()
        done.append(start)
        yield caught.pop()


@torch.no_grad()
def _between(model: nn.Module, blocks: list[Block], entered: Block, image: torch.Size, hidden: Tensor) -> Tensor:
    """What enters a block where the one before it gives `hidden`: the model runs on what lies between the two.

    image: the shape of an image; which one does not matter
    """
    caught: list[Tensor] = []
    before = blocks[blocks.index(entered) - 1]
    device = next((p.device for p in model.parameters() if not p.is_meta), hidden.device)

    def stand_in(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = split_call(args, kwargs)[0]
            if block is entered:
                caught.append(given)
                raise _Stop
            return _returned(block, hidden.to(device) if block is before else block.scaled(given))

        return forward

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(put_forward(block.module, stand_in(block)))
        with suppress(_Stop):
            run_model(model, torch.zeros(len(hidden), *image))
    return caught.pop()


@contextmanager
def passed_over(blocks: list[Block], result: Tensor) -> Iterator[None]:
    """While this lasts, a forward pass of the model does not run its blocks, and goes on behind them.

    result: what the last one gives, hidden states (batch, length, hidden)
    """

    def stand_in(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = split_call(args, kwargs)[0]
            return _returned(block, result if block is blocks[-1] else given)

        return forward

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(put_forward(block.module, stand_in(block)))
        yield


def body(model: Any) -> Any:
    """What gives a language model's head its hidden states; the model itself where its head cannot be run apart."""
    base = getattr(model, "base_model", model)
    if base is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model
    return getattr(base, "decoder", base)  # OPT passes its base by


def _returned(block: Block, hidden: Tensor, others: Mapping[int, Tensor] = MappingProxyType({})) -> Any:
    """What a block's module gives where its hidden states are these, with other outputs by their places."""
    return (hidden, *map(others.get, range(1, block.tuple_length))) if block.tuple_length else hidden
