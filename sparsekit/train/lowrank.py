"""Low-rank updates on peft that keep zeros: W + mask * scale * (B A), its exact gradients, its merge."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear as product

from sparsekit.model import Linear

ADAPTER = "default"  # peft's name of the one adapter
Variant = Literal["masked", "scale", "prune"]


class _Product(torch.autograd.Function):
    """x (W + factor * scale * (B A))' + bias, of which nothing as large as W is kept for the backward pass.

    The gradient of a masked B A needs that of the whole product, g' x: a step costs three large products for each
    linear where plain LoRA, whose W is frozen, costs two. W + ... is made anew in the backward pass, a share of
    rank / tokens of a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor | None,  # (out, in); None: the update alone
        bias: Tensor | None,  # (out,)
        factor: Tensor,  # (out, in), booleans or numbers
        down: Tensor,  # (rank, in)
        up: Tensor,  # (out, rank)
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, factor, down, up)
        ctx.scale = scale
        with torch.autocast(x.device.type, enabled=False):
            made = _effective(weight, factor, down, up, scale).to(x.dtype)
            return product(x, made, bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, factor, down, up = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ _effective(weight, factor, down, up, ctx.scale).to(gradient.dtype)
        rows = gradient.flatten(0, -2)  # (tokens, out)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        full = (rows.t() @ x.flatten(0, -2)).to(up.dtype).mul_(_numbers(factor, up.dtype))  # (out, in)
        return to_x, None, to_bias, None, (up.t() * ctx.scale) @ full, full @ (down.t() * ctx.scale), None


def _effective(weight: Tensor | None, factor: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    update = up * scale @ down  # (out, in)
    if factor is not None:
        update.mul_(_numbers(factor, update.dtype))
    return update if weight is None else update.add_(weight)


def _numbers(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans as 0 and 1: by way of bytes, five times as fast as multiplying by them."""
    return factor.view(torch.uint8).to(dtype) if factor.dtype == torch.bool else factor


class SparseLinear(LoraLinear):  # type: ignore[misc]
    """peft's linear with an update that is zero where the weight is pruned.

    masked: W + mask * s (B A), MaskLoRA of PERP (arXiv:2312.15230)
    scale: W * (1 + s (B A) / r) with r the root mean square of what is kept of W: the identity while B = 0, steps of
        the size of MaskLoRA's, and every component of B and A with a gradient of its own (in PERP's W * (B A) from
        constant factors all components stay equal, so the rank is 1)
    prune: W + s (B A) in training, masked outside of it and in the merge; plain LoRA's step
    """

    mask: Tensor | None  # (out, in)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", None, persistent=False)

    def sparsify(self, mask: Tensor | None, variant: Variant, stored: torch.dtype) -> None:
        """Set the kept weights (out, in), None where all are, how the update respects them, and the dtype on disk."""
        self.mask, self.variant, self.stored = mask, variant, stored
        self.unit = 1.0
        if variant == "scale":
            weight = self.matrix
            kept = float((weight if mask is None else mask).count_nonzero())
            self.unit = math.sqrt(float(weight.float().square().sum()) / max(kept, 1.0)) or 1.0

    @property
    def matrix(self) -> Tensor:
        """The base weight (out, in), a view."""
        return Linear("", self.get_base_layer()).weight

    @property
    def parts(self) -> tuple[Tensor | None, Tensor, Tensor, float]:
        """What multiplies the update elementwise (out, in), None for one everywhere; A; B; what multiplies it all."""
        factor = self.matrix if self.variant == "scale" else self.mask
        down, up = factors(self)
        return factor, down, up, self.scaling[ADAPTER] / self.unit

    @torch.no_grad()
    def effective(self) -> Tensor:
        """The weight (out, in) that the layer has outside of training: in the dtype on disk, zeros as they were."""
        return _effective(self.matrix, *self.parts).to(self.stored)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What peft itself adds when it merges, laid out as the base layer stores its weight."""
        update = _effective(None, *self.parts)
        return (update.t() if self.fan_in_fan_out else update).to(self.matrix.dtype)

    def unmerge(self) -> None:
        """peft's; RuntimeError where the update was a multiple of a weight that is not known any more."""
        if self.variant == "scale" and self.merged:
            raise RuntimeError("a merged update of variant `scale` cannot be taken back; load the model again")
        super().unmerge()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.merged or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        bias: Any = self.get_base_layer().bias
        dropout = self.lora_dropout[ADAPTER]
        if not self.training:
            return product(x, self.effective().to(x.dtype), None if bias is None else bias.to(x.dtype))
        factor, *rest = self.parts
        if factor is None or self.variant == "prune":
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if isinstance(dropout, nn.Dropout):  # the update reads another input than W does
            return self.base_layer(x) + _Product.apply(dropout(x).to(dtype), None, None, factor, *rest)
        return _Product.apply(x.to(dtype), self.matrix, bias, factor, *rest)


def factors(layer: SparseLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a layer."""
    down: Any = layer.lora_A[ADAPTER]
    up: Any = layer.lora_B[ADAPTER]
    return down.weight, up.weight


def attach_updates(
    model: nn.Module,
    linears: Iterable[Linear],
    masks: Mapping[str, Tensor],
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    variant: Variant = "masked",
    stored: Mapping[str, torch.dtype] | None = None,
    seed: int = 0,
) -> dict[str, SparseLinear]:
    """Put a low-rank update beside each linear, in place; name -> layer. B = 0, so the model is what it was.

    masks: linear's name -> the weights (out, in) that are kept; a linear that is not named gets a plain update.
    stored: linear's name -> its dtype on disk, where the model computes in another.
    Everything else of the model is frozen. The factors are float32 whatever the model is.
    Raises ValueError for a weight that is not zero outside its mask.
    """
    linears = list(linears)
    for linear in linears:
        if linear.name in masks and linear.weight.masked_select(~masks[linear.name]).count_nonzero():
            raise ValueError(f"the weight of {linear.name} is not zero outside its mask, so there is no mask to keep")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=[linear.name for linear in linears],
        fan_in_fan_out=linears[0].transposed,
    )
    config._register_custom_module({type(linear.module): SparseLinear for linear in linears})
    torch.manual_seed(seed)
    # freezes all else. Within another module, since peft has its own mind of experts and of Mamba by the model's config
    inject_adapter_in_model(config, nn.ModuleList([model]), ADAPTER)
    layers = {}
    for linear in linears:
        layer = model.get_submodule(linear.name)
        assert isinstance(layer, SparseLinear) and layer.get_base_layer() is linear.module
        mask = masks.get(linear.name)
        kept = None if mask is None else mask.to(linear.weight.device)
        layer.sparsify(kept, variant, (stored or {}).get(linear.name, linear.weight.dtype))
        layers[linear.name] = layer
        for factor in (layer.lora_A, layer.lora_B):
            factor.float()
    return layers


def detach_updates(model: nn.Module, layers: Mapping[str, SparseLinear], *, merge: bool = True) -> None:
    """Put the model's own linears back, with the updates in their weights if `merge`; zeros are what they were."""
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if merge:
            Linear(name, base).write_pruned(layer.effective())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
