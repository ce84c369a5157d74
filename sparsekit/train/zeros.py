"""Zeros that stay zeros while others are trained: the mask on every gradient, and a callback for anybody's training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekit.model import Linear, all_linears

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # a process has no whole weight there


def masked_gradient(weight: Tensor, kept: Tensor) -> RemovableHandle:
    """Have a parameter's gradient be zero outside `kept` (its shape) before anything sees it: clipping, optimizer, log.

    So momentum is zero there, and what weight decay makes of zero is zero.
    """
    held = [kept]  # on the CPU until the first gradient comes

    def zero(parameter: Tensor) -> None:
        assert parameter.grad is not None
        held[0] = held[0].to(parameter.grad.device)
        parameter.grad.mul_(held[0])

    return weight.register_post_accumulate_grad_hook(zero)


class HoldZeros(Callback):
    """Holds the zeros of a pruned model exactly through any `Trainer.fit`: any optimizer, precision, clipping or decay.

        Trainer(callbacks=[HoldZeros(), ...]).fit(module, data)

    Gradients are masked as they come, and what an optimizer makes of a pruned weight nevertheless is undone after each
    of its steps.

    masks: linear's name -> the weights (out, in) that are kept, as `sparsekit.masks(folder)` gives them, or the folder
        of a run; the names are those of the pruned model, which may be anywhere inside the LightningModule. None: the
        linears' own zeros are held, where a linear has at least `least` of them.
    least: share of zeros from which on a linear counts as pruned

    Raises when training starts:
        ValueError: a name fits no linear or several, a weight is not zero where its mask says so, nothing is pruned,
            or weights are divided among processes (FSDP, DeepSpeed), where no process has a whole one.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | Path | None = None, *, least: float = 0.01):
        self.masks, self.least = masks, least
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the pruned weights and hold them from here on."""
        name = type(trainer.strategy).__name__
        if name in SHARDED:
            raise ValueError(f"HoldZeros cannot hold zeros under {name}, which divides weights; use one device, or DDP")
        self._held = [_pair(linear, kept) for linear, kept in self._found(module).values()]
        for parameter, kept in self._held:
            self._handles.append(masked_gradient(parameter, kept))
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._zero()))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Let go."""
        self._release()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._release()

    def _release(self) -> None:
        self._zero()
        for handle in self._handles:
            handle.remove()
        self._handles, self._held = [], []

    @torch.no_grad()
    def _zero(self) -> None:
        for index, (parameter, kept) in enumerate(self._held):
            if kept.device != parameter.device:
                kept = kept.to(parameter.device)
                self._held[index] = (parameter, kept)
            parameter.masked_fill_(~kept, 0.0)

    def _found(self, module: nn.Module) -> dict[str, tuple[Linear, Tensor]]:
        linears = all_linears(module)
        if self.masks is None:
            own = {name: (linear, linear.weight != 0) for name, linear in linears.items()}
            found = {n: pair for n, pair in own.items() if float((~pair[1]).float().mean()) >= self.least}
            if not found:
                raise ValueError("no linear has zeros to hold: give HoldZeros the masks, or a model that is pruned")
            return found
        masks = self.masks
        if not isinstance(masks, Mapping):
            from sparsekit.results import masks as read_masks

            masks = read_masks(masks)
        return {name: _fitting(name, kept, linears) for name, kept in masks.items()}


def _fitting(name: str, kept: Tensor, linears: Mapping[str, Linear]) -> tuple[Linear, Tensor]:
    fits = [full for full in linears if f".{full}".endswith(f".{name}")]
    if len(fits) != 1:
        found = f"{len(fits)} linears ({', '.join(fits[:2])})" if fits else "no linear"
        raise ValueError(f"the mask of {name} fits {found} of the module; give masks by the names of its linears")
    linear = linears[fits[0]]
    if tuple(kept.shape) != linear.shape:
        raise ValueError(f"the mask of {name} is {tuple(kept.shape)}, the linear {linear.shape}")
    if int(linear.weight[~kept.to(linear.weight.device)].count_nonzero()):
        raise ValueError(f"the weight of {name} is not zero outside its mask, so there are no zeros to hold")
    return linear, kept


def _pair(linear: Linear, kept: Tensor) -> tuple[nn.Parameter, Tensor]:
    """The parameter and its mask as it is stored."""
    weight: Any = linear.module.weight
    return weight, linear.stored(kept)
