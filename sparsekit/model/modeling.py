"""The small modeling file with which transformers loads layers of different widths, without sparsekit."""

import inspect
from string import Template
from typing import Any

from torch import nn

from sparsekit.model.discovery import find_blocks
from sparsekit.model.structure.nothing import Nothing

# families whose decoder layers are made of (config, index) and hold self_attn and mlp
FAMILIES = (
    *("apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite"),
    *("hunyuan_v1_dense", "llama", "ministral", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3"),
    "starcoder2",
)
PREFIX = "sparsekit"

TEMPLATE = '''\
"""$causal with layers of different widths, as sparsekit stored it; needs torch and transformers 4.48 or later only:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

In config.json, `per_layer_config` has the widths of the layers that differ: intermediate_size, num_key_value_heads and
num_attention_heads. 0: the layer has no MLP, or no attention. `added_biases` names the linears that have a bias which
the family gives them none of.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import $config_class, $causal, $base
from $module import $layer


def checked(kind: type) -> type:
    """The config's fields are checked as the family's own are, where transformers does so."""
    if not is_dataclass($config_class):
        return kind
    from huggingface_hub.dataclasses import strict

    return strict(kind)


@checked
class Sparsekit$config_class($config_class):
    model_type = "$model_type"
    added_biases: list[str] | None = None

    def validate_architecture(self):
        """The heads that are left need not divide the hidden size."""

    if "rope_parameters" not in inspect.signature($config_class.__init__).parameters:  # transformers before 5

        def __init__(self, **given):
            told = dict(given.pop("rope_parameters", None) or {})
            if "rope_theta" in told:
                given["rope_theta"] = told.pop("rope_theta")
            if told.get("rope_type", "default") != "default":
                given["rope_scaling"] = told
            super().__init__(**given)


def own_config(config: Sparsekit$config_class, index: int) -> Any:
    """A copy of the config with a layer's own widths."""
    told = config.per_layer_config
    if not isinstance(told, dict):  # transformers that knows of layers that differ
        return told[index]
    own = copy(config)
    for key, value in told.get(str(index), {}).items():
        setattr(own, key, value)
    return own


$nothing

def make_layer(config: Sparsekit$config_class, index: int) -> nn.Module:
    own = own_config(config, index)
    attention, mlp = own.num_key_value_heads, own.intermediate_size
    if not attention:  # something that can be built, for a moment
        own.num_attention_heads = own.num_key_value_heads = 1
    own.intermediate_size = own.intermediate_size or 1
    layer = $layer(own, index)
    if not attention:
        layer.self_attn = Nothing(index)
    if not mlp:
        layer.mlp = Nothing()
    for name, module in layer.named_modules():
        if hasattr(module, "config"):
            module.config = config  # one for all, so that set_attn_implementation reaches every layer
        if f"{index}.{name}" in (config.added_biases or ()):
            module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]))
    return layer


@contextmanager
def without_layers(config: Sparsekit$config_class) -> Iterator[None]:
    """While this lasts, models are made without layers."""
    count, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = count


class Sparsekit$base($base):
    config_class = Sparsekit$config_class

    def __init__(self, config: Sparsekit$config_class):
        with without_layers(config):
            super().__init__(config)
        self.layers.extend(make_layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class Sparsekit$causal($causal):
    config_class = Sparsekit$config_class

    def __init__(self, config: Sparsekit$config_class):
        with without_layers(config):
            super().__init__(config)
        self.model = Sparsekit$base(config)
        self.post_init()
'''


def has_modeling(model: nn.Module) -> bool:
    """Whether this model's family is one that a modeling file can be written for."""
    return model.config.model_type in FAMILIES  # type: ignore[union-attr,operator]


def write_modeling(model: nn.Module) -> tuple[str, str, dict[str, Any]]:
    """The modeling file of a model's family, the same for all models of it.

    Returns:
        its name, its text, and the fields of config.json that lead transformers to it
    """
    family = f"{PREFIX}_{model.config.model_type}"  # type: ignore[union-attr]
    file = f"modeling_{family}"
    found = {"config_class": model.config, "causal": model, "base": model.model, "layer": find_blocks(model)[0].module}
    names = {key: type(value).__name__ for key, value in found.items()}
    text = Template(TEMPLATE).substitute(
        names, model_type=family, module=type(model).__module__, nothing=inspect.getsource(Nothing)
    )
    classes = {"AutoConfig": "config_class", "AutoModel": "base", "AutoModelForCausalLM": "causal"}
    return (
        f"{file}.py",
        text,
        {
            "model_type": family,
            "architectures": [f"{PREFIX.capitalize()}{names['causal']}"],
            "auto_map": {auto: f"{file}.{PREFIX.capitalize()}{names[key]}" for auto, key in classes.items()},
        },
    )
