"""What must be true of any checkpoint, whatever it was made from: what transformers loads of it is all there is."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekit.model import Tensors, tied_names

ADAPTER = "adapter_config.json"  # transformers would put an adapter on top of the weights


def unsound(stored: Tensors) -> Iterator[str]:
    """What is wrong, as sentences: files that are not read, tensors twice, too many, missing, of other shapes."""
    checkpoint = stored.stored
    for file in checkpoint.unread:
        yield f"{file} is a file of weights that transformers does not read; remove it"
    if (checkpoint.folder / ADAPTER).is_file():
        yield f"{ADAPTER} would have transformers put an adapter on top of the weights; remove it"
    for name in {*checkpoint.doubled, *stored.doubled}:
        yield f"{name} is stored twice"
    for name in stored.unused:
        yield f"{name} is stored and no tensor of {type(stored.model).__name__}"
    for name in stored.missing:
        yield f"{name} is missing: loading would fill it with random numbers"
    state = stored.model.state_dict()
    for name in stored:
        if stored.shape(name) != tuple(state[name].shape):
            yield f"{name} has shape {stored.shape(name)}, by the config {tuple(state[name].shape)}"


def bad_values(stored: Tensors, name: str, tensor: Tensor) -> Iterator[str]:
    """What is wrong with one of its tensors, as sentences: no real numbers, NaN or Inf, unlike what it is tied to."""
    twin = tied_names(stored.model).get(name)
    if tensor.is_complex():
        yield f"{name} is {tensor.dtype}, and weights are real numbers"
    elif name in stored.parameters and not _finite(tensor):  # a buffer may have no bound
        yield f"{name} contains NaN or Inf"
    elif twin is not None and twin in stored and not torch.equal(tensor, stored[twin]):
        yield f"{name} and {twin} are tied in the config but differ on disk"


def _finite(tensor: Tensor) -> bool:
    """No NaN and no Inf: the extremes tell, in one pass without a mask."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # an 8-bit float has no extremes of its own
    return all(bool(extreme.isfinite()) for extreme in wide.aminmax())
