"""A low-rank update on disk: plain peft where it is plain; else nothing that could be loaded without its mask."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sparsekit.model import Linear, split_experts
from sparsekit.system import pack, unpack, write_atomically, write_json, write_tensors
from sparsekit.train.lowrank import ADAPTER, SparseLinear, attach_updates, factors

TYPE = "SPARSE_LORA"  # no type of peft's: whatever reads it as an adapter of its own fails
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, layers: Mapping[str, SparseLinear], base: str) -> None:
    """Write the updates. base: the name or folder of the model that they belong to.

    Where no layer has a mask it is an adapter as peft writes it. Otherwise its type is none that peft knows, its
    tensors are called `sparse_A` and `sparse_B`, and the masks are among them, one bit a weight: readers that look at
    the type fail, readers that look at names find nothing to apply, and neither fills a zero.
    """
    some = next(iter(layers.values()))
    sparse = any(layer.variant == "scale" or layer.mask is not None for layer in layers.values())
    config: dict[str, Any] = {
        "peft_type": TYPE if sparse else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": some.r[ADAPTER],
        "lora_alpha": some.lora_alpha[ADAPTER],
        "fan_in_fan_out": some.fan_in_fan_out,
        "target_modules": sorted(layers),
    }
    tensors = {}
    for name, layer in layers.items():
        for letter, factor in zip("AB", factors(layer), strict=True):
            key = f"{name}.sparse_{letter}" if sparse else f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = factor.detach().cpu().contiguous()
        if sparse and layer.mask is not None:
            tensors[f"{name}.mask"] = pack(layer.mask)
    if sparse:
        config["variant"] = some.variant
    write_atomically(folder / WEIGHTS, lambda aside: write_tensors(aside, tensors))
    write_json(folder / CONFIG, config)


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, SparseLinear]:
    """Put the updates of a folder that `save` wrote into their model, masks included; linear's name -> layer.

    Raises:
        ValueError: the folder holds no such update, or the model's zeros are not those of the masks.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}, so it is no adapter")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["peft_type"] != TYPE:
        raise ValueError(f"{folder} holds an adapter of type {config['peft_type']}: load it with peft itself")
    split_experts(model)
    linears = [Linear(name, model.get_submodule(name)) for name in config["target_modules"]]
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        found = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)
    masks = {
        linear.name: unpack(found[f"{linear.name}.mask"], linear.shape)
        for linear in linears
        if f"{linear.name}.mask" in found
    }
    layers = attach_updates(
        model, linears, masks, rank=config["r"], alpha=config["lora_alpha"], variant=config["variant"]
    )
    with torch.no_grad():
        for name, layer in layers.items():
            for letter, factor in zip("AB", factors(layer), strict=True):
                factor.copy_(found[f"{name}.sparse_{letter}"])
            layer.eval()
    return layers
