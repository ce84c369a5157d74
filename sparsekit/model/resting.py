"""Blocks whose weights stay on disk until their turn comes, so that a model need not fit into memory.

A block is settled on tensors of a checkpoint: it lets go of its weights and holds empty ones, on the meta device. It is
filled when it is reached, and empty again afterwards. What was changed in between is lost unless it was written, and
the block settled on what was written. Blocks of a model that came in memory are never settled, and everything here
leaves them as they are.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, experts_of
from sparsekit.model.expert_forms import joined
from sparsekit.model.tensors import Tensors, tied_names

# a block's module -> the tensors that it is filled from; None: it may be settled, and is not
_homes: "WeakKeyDictionary[nn.Module, Tensors | None]" = WeakKeyDictionary()


def settle(block: Block, tensors: Tensors) -> None:
    """From now on a block is filled from these tensors; its weights leave the memory."""
    _homes[block.module] = tensors
    empty(block)


def unsettle(blocks: Iterable[Block]) -> None:
    """Keep these blocks in memory, filled: they are about to become what is on no disk yet."""
    for block in blocks:
        if may_rest(block):
            fill(block)
            _homes[block.module] = None


def may_rest(block: Block) -> bool:
    """Whether a block belongs to a model that is read from disk block by block."""
    return block.module in _homes


def rests(block: Block) -> bool:
    """Whether a block is empty."""
    return _homes.get(block.module) is not None and any(p.is_meta for p in block.module.parameters())


@torch.no_grad()
def fill(block: Block) -> None:
    """Give an empty block its weights, in CPU memory, mapped from the disk where they are stored as the model has them.

    The map is this block's own: pages that are written to go with it.
    """
    tensors = _homes.get(block.module)
    if tensors is None or not rests(block):
        return
    with joined(block.module):
        wanting = {name: parameter for name, parameter in block.module.named_parameters() if parameter.is_meta}
        found = tensors.several(f"{block.name}.{name}" for name in wanting)
        for name, parameter in wanting.items():
            tensor = found.pop(f"{block.name}.{name}").to(parameter.dtype)
            _put(block.module, name, nn.Parameter(tensor, parameter.requires_grad))
    _look(block)


@torch.no_grad()
def empty(block: Block) -> None:
    """Let go of the weights of a block that is settled; where it was filled from, they still are."""
    tensors = _homes.get(block.module)
    if tensors is None:
        return
    tied = tied_names(tensors.model)
    shared = {*tied, *tied.values()}
    with joined(block.module):
        for name, parameter in list(block.module.named_parameters()):
            if not parameter.is_meta and f"{block.name}.{name}" not in shared:
                bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                _put(block.module, name, nn.Parameter(bare, parameter.requires_grad))
    _look(block)


@torch.no_grad()
def fill_outside(model: Any, blocks: Iterable[Block], tensors: Tensors) -> None:
    """Give a model whose parameters are empty those outside its blocks, and all buffers that are stored; tie copies."""
    inside = {f"{block.name}.{name}" for block in blocks for name, _ in block.module.named_parameters()}
    with joined(model):
        state = dict(model.state_dict(keep_vars=True))
        missing = {name for name in state if not tensors.stores(name)}
        inside -= {*tied_names(model), *tied_names(model).values()}  # a copy outside would be empty for ever
        for name, tensor in tensors.several(state.keys() - missing - inside).items():
            own, old = tensor.to(state[name].dtype), state[name]
            _put(model, name, nn.Parameter(own, old.requires_grad) if isinstance(old, nn.Parameter) else own)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for experts in experts_of(model).values():  # of a part of the model that is none of the blocks
        if not any(parameter.is_meta for parameter in experts.fused.parameters()):
            experts.look()


@contextmanager
def filled(blocks: Iterable[Block], device: torch.device | None = None) -> Iterator[None]:
    """While this lasts, these blocks have their weights; those that were empty are empty afterwards.

    device: where those are meanwhile; None: in CPU memory
    """
    taken = [block for block in blocks if rests(block)]
    try:
        for block in taken:
            fill(block)
            if device is not None:
                block.to(device)
        yield
    finally:
        for block in taken:
            empty(block)
            if device is not None:
                _move(block.module, torch.device("cpu"), set())


@contextmanager
def on_device(model: nn.Module, blocks: Iterable[Block], device: torch.device) -> Iterator[None]:
    """While this lasts, a model is on a device, but for its empty blocks; afterwards it is in CPU memory."""
    empties = {block.module for block in blocks if rests(block)}
    try:
        _move(model, device, empties)
        yield
    finally:
        _move(model, torch.device("cpu"), empties)


@torch.no_grad()
def _move(module: nn.Module, device: torch.device, without: set[nn.Module]) -> None:
    """Move a module, but for these modules inside it, and for what is empty."""
    if module in without:
        return
    if without.isdisjoint(module.modules()) and not any(parameter.is_meta for parameter in module.parameters()):
        module.to(device)
        return
    for own in module.parameters(recurse=False):
        if not own.is_meta:
            own.data = own.data.to(device)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
    for child in module.children():
        _move(child, device, without)


@contextmanager
def filled_in_turn(blocks: Iterable[Block]) -> Iterator[None]:
    """While this lasts, a forward pass of the model fills each empty block when it reaches it, and empties it again."""

    def reached(block: Block) -> Any:
        return block.module.register_forward_pre_hook(lambda *_: fill(block))

    def left(block: Block) -> Any:
        return block.module.register_forward_hook(lambda *_: empty(block), always_call=True)

    with ExitStack() as stack:
        for block in filter(rests, blocks):
            stack.callback(empty, block)
            for hook in (reached(block), left(block)):
                stack.callback(hook.remove)
        yield


def _put(module: nn.Module, name: str, parameter: Tensor) -> None:
    inner, _, own = name.rpartition(".")
    setattr(module.get_submodule(inner), own, parameter)


def _look(block: Block) -> None:
    for experts in block.experts.values():
        experts.look()
