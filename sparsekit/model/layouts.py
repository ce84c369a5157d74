"""How a cut model can be stored: by its config alone, by a generated modeling file, or so that only sparsekit opens it.

Only the first says all to any program that knows the family; the configs of transformers have one width for all layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from sparsekit.model import modeling, rebuild
from sparsekit.model.discovery import find_blocks
from sparsekit.model.older import with_older_names
from sparsekit.model.structure.experts import count_experts
from sparsekit.model.structure.shape import Layer, Shape
from sparsekit.model.vision import described, sees_images

MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "mlp_dim")  # what configs call it
MAMBA_HEADS = ("mamba_d_ssm", "mamba_n_heads", "mamba_num_heads", "num_heads")
MAMBA_GROUPS = ("mamba_n_groups", "n_groups")  # of heads, which share B and C; where there are several they go whole
MAMBA_WIDTHS = ("expand", "mamba_expand")  # times the hidden size
BIASES = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}  # fields of configs that give linears biases


@dataclass
class Layout:
    """name: plain, generated or own; load: what opens it, in words; config: config.json; files: name -> text of others;
    zeros: tensors to store that the model does not have, all zero."""

    name: str
    load: str
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)


def choose_layout(model: Any, shape: Shape) -> Layout:
    """The best layout that can say what the model is: see `storage.save`."""
    for config in _plain(model, shape):
        try:
            built = rebuild.build(config)
        except ValueError:  # LlamaConfig refuses numbers of heads that do not divide the hidden size: the next may not
            continue
        if rebuild.difference(built, model, spare=".bias") is None:
            said = _said(config, shape.config, sees_images(model))
            return Layout("plain", said, with_older_names(config), zeros=_zeros(built, model))
    each = {str(index): widths(model, layer, shape.queries) for index, layer in enumerate(shape.layers)}
    config = shape.config | {
        "num_hidden_layers": len(shape.layers),  # under this name too, which per_layer_config asks for
        "per_layer_config": {index: own for index, own in each.items() if own},
        "added_biases": _inner(model, shape),
    }
    if modeling.has_modeling(model):
        name, text, fields = modeling.write_modeling(model)
        load = (
            "transformers: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), which runs "
            f"{name}; or sparsekit.load(folder), which does not"
        )
        return Layout("generated", load, with_older_names(config | head_dim(model) | fields), {name: text})
    load = "sparsekit.load(folder); no config of transformers can say what this model is"
    # a type that transformers does not know: it would fill what a config of the family promises with random numbers
    return Layout("own", load, config | {"model_type": f"{modeling.PREFIX}_{shape.config['model_type']}"})


def widths(model: Any, layer: Layer, queries: bool = False) -> dict[str, int]:
    """The fields of the config that are others in this layer, as they must be there; 0: the part is gone.

    queries: whether heads are query heads that all share one key
    """
    config = described(model)
    found: dict[str, int] = {}
    if layer.heads is not None:
        name = config.attribute_map.get("num_attention_heads", "num_attention_heads")
        heads = getattr(config, name)
        groups = getattr(config, "num_key_value_heads", None) or heads
        if queries:
            if layer.heads.kept != heads:
                found[name] = layer.heads.kept
                found |= {} if layer.heads.kept else {"num_key_value_heads": 0}
        elif layer.heads.kept != groups:
            found[name] = heads // groups * layer.heads.kept
            if hasattr(config, "num_key_value_heads"):
                found["num_key_value_heads"] = layer.heads.kept
    if layer.channels is not None:
        name = next((name for name in MLP_WIDTHS if hasattr(config, name)), MLP_WIDTHS[0])
        if layer.channels.kept != layer.channels.of:
            found[name] = layer.channels.kept
    return found


def head_dim(model: Any) -> dict[str, int]:
    """The field that says the size of a head: else it would be the hidden size over the heads that are left."""
    sizes = (getattr(module, "head_dim", None) for module in model.modules())
    return next(({"head_dim": size} for size in sizes if isinstance(size, int)), {})  # no attention is left: none


def _plain(model: Any, shape: Shape) -> Iterator[dict[str, Any]]:
    """Configs that may say all of what the model is, the family's own first."""
    first, *others = (widths(model, layer, shape.queries) for layer in shape.layers)
    if any(other != first for other in others) or 0 in first.values():
        return
    experts = {layer.experts.kept: layer.experts.of for layer in shape.layers if layer.experts is not None}
    if any(kept < of for kept, of in experts.items()):
        if len(experts) > 1:
            return  # the config has one number for all
        first[count_experts(model, find_blocks(model)).field] = next(iter(experts))
    mambas = {(layer.mamba.kept, layer.mamba.of) for layer in shape.layers if layer.mamba is not None}
    cut = any(kept < of for kept, of in mambas)
    if cut and len(mambas) > 1:
        return
    if any("heads" in name for name in first) or "n_head" in first:
        first |= head_dim(model)
    inner = "vision_config" if sees_images(model) else "text_config"
    own = shape.config.get(inner, shape.config)
    flags = {flag: True for flag, part in BIASES.items() if flag in own and any(part in n for n in shape.biases)}
    alone = all(layer.channels is None for layer in shape.layers)
    for fields in _of_mamba(own, Fraction(*mambas.pop()), alone) if cut else [{}]:
        changed = own | first | flags | fields
        yield shape.config | {inner: changed} if inner in shape.config else changed
    if shape.config["model_type"] == "llama":
        rest = {key: value for key, value in changed.items() if key not in (*BIASES, "pretraining_tp")}
        yield rest | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def _of_mamba(own: Mapping[str, Any], share: Fraction, alone: bool) -> Iterator[dict[str, int]]:
    """Fields of a config that may say that a share of every Mamba's channels is left, as whole numbers.

    alone: there are no MLPs, so that `intermediate_size` is of the Mambas
    """
    fields = {name: own[name] * share for name in MAMBA_HEADS if isinstance(own.get(name), int)}
    fields |= {name: own[name] * share for name in MAMBA_GROUPS if isinstance(own.get(name), int) and own[name] > 1}
    wide = {name: own[name] * share for name in MAMBA_WIDTHS if isinstance(own.get(name), int)}
    inner = {name: own[name] * share for name in ("intermediate_size",) if alone and name in own}
    for given in (fields | inner or wide, fields | wide, fields):
        if given and all(value.denominator == 1 for value in given.values()):
            yield {name: int(value) for name, value in given.items()}


def _said(config: dict[str, Any], source: dict[str, Any], seen: bool) -> str:
    opens = config["architectures"][0] if seen else "AutoModelForCausalLM"
    plain = f"transformers: {opens}.from_pretrained(folder)"
    if config["model_type"] == source["model_type"]:
        return plain
    return (
        f"{plain}; stored as {config['model_type']}, which computes the same: a config of {source['model_type']} takes "
        f"no {config['num_attention_heads']} heads at a hidden size of {config['hidden_size']}"
    )


def _zeros(built: Any, model: Any) -> dict[str, Tensor]:
    """A config gives biases to all linears of a kind or to none: those that the model lacks are zero."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: torch.zeros(parameter.shape, dtype=model.dtype)
        for name, parameter in built.named_parameters(remove_duplicate=False)
        if name not in names
    }


def _inner(model: Any, shape: Shape) -> list[str]:
    """The linears with added biases, by index of the layer and name inside it."""
    home = find_blocks(model)[0].name.rpartition(".")[0]
    return [name.removeprefix(f"{home}.") for name in shape.biases]
