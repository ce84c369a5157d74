"""Adapters of peft on a pruned model whose update never touches a zero, in training and when they are merged."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

LEAST = 0.01  # share of zeros from which on a linear counts as pruned, as for HoldZeros


def mask_adapters(model: Any, *, least: float = LEAST) -> Any:
    """Have peft's LoRA keep the zeros of a pruned model: W + mask * scaling (B A), in training and when merged.

        model = sparsekit.mask_adapters(peft.get_peft_model(model, config))
        ... any training ...
        model = model.merge_and_unload()   # as sparse as before

    Without it peft adds scaling (B A) everywhere, and merging leaves no zero. Adapters that are saved are peft's own;
    whoever loads them calls this again before the first forward pass. It computes three large products for a linear
    where peft has two (docs/methods/lora.md), and changes the model in place.

    model: of peft, with LoRA on linears; least: share of zeros from which on a linear counts as pruned

    Returns:
        the same model

    Raises:
        ValueError: no linear that has an adapter has zeros, a linear is stored transposed (GPT-2), or an adapter has
            dropout, DoRA or what else is no scaling (B A), which cannot be masked.
    """
    from peft.tuners.lora import Linear

    found = 0
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        base: Any = module.get_base_layer()
        kept: Tensor = base.weight != 0
        if float((~kept).float().mean()) < least:
            continue
        _check(name, module)
        _mask(module, kept)
        found += 1
    if not found:
        raise ValueError(
            "no linear with an adapter of peft's LoRA has zeros: give a pruned model, after get_peft_model and before "
            "anything is merged"
        )
    return model


def _check(name: str, module: Any) -> None:
    if not isinstance(module.get_base_layer(), nn.Linear):
        raise ValueError(
            f"{name} is a {type(module.get_base_layer()).__name__}; adapters of torch's linears can be masked"
        )
    dropout = [each for each in module.lora_dropout.values() if not isinstance(each, nn.Identity) and each.p]
    if dropout:
        raise ValueError(f"{name} has lora_dropout {dropout[0].p}, which no mask can follow: give lora_dropout=0")
    if module.merged:
        raise ValueError(f"{name} is merged already: mask its adapters before")
    variants = getattr(module, "lora_variant", None) or {}
    if any(each is not None for each in variants.values()) or any(getattr(module, "use_dora", {}).values()):
        raise ValueError(f"{name} has an adapter that is more than B A, such as DoRA: plain LoRA can be masked")


def _mask(module: Any, kept: Tensor) -> None:
    """Make the update of one linear masked, in its forward pass and wherever peft asks for the update itself."""
    update, plain = module.get_delta_weight, module.forward
    held = [kept]

    def masked(adapter: str) -> Tensor:
        delta: Tensor = update(adapter)
        if held[0].device != delta.device:
            held[0] = held[0].to(delta.device)
        return delta * held[0]

    def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = module.get_base_layer()
        active = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged or not active:
            given: Tensor = plain(inputs, *args, **kwargs)
            return given
        weight = base.weight
        for name in active:
            weight = weight + masked(name).to(weight.dtype)
        return linear(inputs.to(weight.dtype), weight, base.bias).to(inputs.dtype)

    module.get_delta_weight = masked
    module.forward = forward
