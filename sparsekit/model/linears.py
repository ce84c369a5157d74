"""The linears of a model: whatever multiplies its input by a matrix, however its weight is stored."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Linear:
    """One linear. Its weight is (out, in) whatever the layer stores: the one place that knows Conv1D and convolutions.

    A convolution is a linear over unfolded patches: in = channels x the kernel's sides, in the order of its weight.
    """

    def __init__(self, name: str, module: nn.Module):
        self.name = name  # of the module inside the model; the parameter is name + ".weight"
        self.module = module
        self.transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores (in, out)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), a view of the parameter."""
        return self.matrix(self.module.weight.detach())  # type: ignore[operator,arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return tuple(self.weight.shape)  # type: ignore[return-value]

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set the weight (out, in), cast to the parameter's dtype, bit for bit."""
        self.weight.copy_(weight)

    @torch.no_grad()
    def write_pruned(self, weight: Tensor) -> None:
        """The same for a solver's answer: -0.0 becomes 0.0."""
        self.weight.copy_(weight).add_(0.0)

    def stored(self, weight: Tensor) -> Tensor:
        """A tensor (out, in) laid out as a checkpoint stores it."""
        if isinstance(self.module, CONVOLUTIONS):
            return weight.reshape(len(weight), -1, *self.module.kernel_size).contiguous()
        return weight.t().contiguous() if self.transposed else weight.contiguous()

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor laid out as a checkpoint stores it, as (out, in); a view."""
        if isinstance(self.module, CONVOLUTIONS):
            return stored.view(len(stored), -1)
        return stored.t() if self.transposed else stored


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be pruned: nn.Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution that is a linear over patches: in one group, not dilated, padded by zeros."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == 1
        and set(module.dilation) == {1}
        and module.padding_mode == "zeros"
    )


def linears_of(module: nn.Module, convolutions: Collection[str] = ()) -> list[tuple[str, nn.Module]]:
    """Name and module of every linear inside a module, in order of definition.

    convolutions: names inside it of those that count as linears too
    """
    return [(name, m) for name, m in module.named_modules() if is_linear(m) or name in convolutions]


def all_linears(model: nn.Module) -> dict[str, Linear]:
    """Every linear of a model by its name, in blocks and outside, and every convolution that is one over patches."""
    return {name: Linear(name, m) for name, m in model.named_modules() if is_linear(m) or is_convolution(m)}


def full_name(home: str, inner: str) -> str:
    """The name of what is called `inner` inside the module `home`; empty: the module itself."""
    return f"{home}.{inner}" if inner else home


def rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear multiplies by its weight: its input (..., in), or a convolution's unfolded patches.

    Those are (images, positions, in), the positions in the order of the output; parts of a patch that lie outside the
    image are zero.
    """
    if not isinstance(module, CONVOLUTIONS):
        return inputs
    sides = len(module.kernel_size)
    patches = inputs if inputs.dim() == sides + 2 else inputs[None]
    patches = nn.functional.pad(patches, _padding(module))
    for place, (size, step) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
        patches = patches.unfold(2 + place, size, step)  # (images, channels, positions ..., sides of the kernel ...)
    order = [0, *range(2, 2 + sides), 1, *range(2 + sides, 2 + 2 * sides)]
    return patches.permute(order).flatten(1 + sides).flatten(1, sides)


def _padding(module: Any) -> Sequence[int]:
    """Of the sides, the last one first, as nn.functional.pad takes it."""
    if module.padding == "same":
        return [n for size in reversed(module.kernel_size) for n in ((size - 1) // 2, size - 1 - (size - 1) // 2)]
    each = [0] * len(module.kernel_size) if module.padding == "valid" else module.padding
    return [n for size in reversed(each) for n in (size, size)]
