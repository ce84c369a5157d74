"""Layers of unequal widths as NVIDIA's DeciLM (Nemotron-NAS) tells of them, which vLLM and mlx-lm run by themselves."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.model import Checkpoint
from sparsekit.model.structure import SERVED
from sparsekit.results.exporters.rewriting import rewrite
from sparsekit.system import write_json

FAMILIES = ("llama", "mistral", "qwen2")
OURS = "sparsekit_"  # before the family's name in the config of a model whose layers differ in width
MODULE = "configuration_decilm.py"
COPIED = (  # fields of the config that mean the same there
    *("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings", "dtype"),
    *("torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
)
LOADED = """```
vllm serve FOLDER --trust-remote-code
mlx_lm.generate --model FOLDER --prompt "..."
```"""
CONFIG = '''\
"""The config of a model whose layers differ in width, under the names that vLLM asks for."""

from transformers import PretrainedConfig


class Entries(dict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **settings):
        self.block_configs = [
            Entries(attention=Entries(block["attention"]), ffn=Entries(block["ffn"])) for block in block_configs
        ]
        super().__init__(**settings)
'''


def deci() -> Exporter:
    """Layers of unequal widths as DeciLM has them (`block_configs`), for vLLM's and mlx-lm's own code of that model.

    For LLaMA, Mistral and Qwen 2. There all attentions have as many query heads, and MLPs a multiple of 256 channels:
    zeros stand for what is missing, which compute nothing and take memory. What is cut with `shape: serving` needs
    none: whole attentions, whole MLPs, channels by 256. vLLM asks for `--trust-remote-code`: the config is a small
    file in the folder.

    Source: DeciLM's config, Nemotron-NAS (Bercovich et al. 2024, Puzzle, arXiv 2411.19146), as vLLM reads it.
    """
    return Exporter(
        _why_not,
        lambda finished, target: _write(finished.folder, target),
        lambda finished, target: _differences(finished.folder, target),
    )


@dataclass(frozen=True)
class Layer:
    """heads, keys, width: query heads, key heads and channels that the model has, 0 where a part is gone; key_heads and
    channels: that it has there, with zeros, 0 where there is no such part."""

    heads: int
    keys: int
    width: int
    key_heads: int
    channels: int


@dataclass(frozen=True)
class Deci:
    """A model as DeciLM counts it. heads: query heads of every attention; head: numbers of each; biases: whether its
    attentions, and its MLPs, have biases."""

    config: dict[str, Any]
    layers: tuple[Layer, ...]
    heads: int
    head: int
    biases: tuple[bool, bool]

    @classmethod
    def read(cls, folder: Path) -> "Deci":
        """Of a checkpoint. ValueError, a sentence, for what cannot be told so."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = str(config.get("model_type")).removeprefix(OURS)
        if family not in FAMILIES:
            raise ValueError(f"models of type {family} cannot be told as DeciLM; {', '.join(FAMILIES)} can")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"DeciLM is run with silu, and the config has {config['hidden_act']}")
        if config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
            raise ValueError("DeciLM does not slide the window of its attention, so longer texts would differ")
        differ = config.get("per_layer_config") or {}

        def each(key: str) -> list[int]:
            count = config["num_hidden_layers"]
            return [int((differ.get(str(index)) or {}).get(key, config[key])) for index in range(count)]

        heads, keys, widths = map(each, ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
        head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        natural, odd = divmod(int(config["hidden_size"]), head)
        most = max(heads) if odd else max(*heads, natural)  # mlx-lm takes the hidden size over the heads for a head's
        layers = []
        for index, (queries, kept, width) in enumerate(zip(heads, keys, widths, strict=True)):
            there = _key_heads(most, queries, kept) if queries else int(not index)  # vLLM's first layer must have one
            layers.append(Layer(queries, kept, width, there, -(-width // SERVED) * SERVED))
        stored = Checkpoint(folder)
        has = [any(f".{part}." in name and name.endswith(".bias") for name in stored) for part in ("self_attn", "mlp")]
        return cls(config, tuple(layers), most, head, (has[0], has[1]))

    def told(self) -> dict[str, Any]:
        """The config that says so."""
        hidden = int(self.config["hidden_size"])
        blocks = [
            {
                "attention": {
                    "no_op": not layer.key_heads,
                    "replace_with_linear": False,
                    "n_heads_in_group": self.heads // layer.key_heads if layer.key_heads else None,
                },
                "ffn": {
                    "no_op": not layer.channels,
                    "replace_with_linear": False,
                    # rounded up to the next multiple there
                    "ffn_mult": 3 * (layer.channels - SERVED / 2) / (2 * hidden) if layer.channels else None,
                },
            }
            for layer in self.layers
        ]
        return {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": f"{MODULE.removesuffix('.py')}.DeciLMConfig"},
            **{key: self.config[key] for key in COPIED if self.config.get(key) is not None},
            **self._rotary(),
            "num_attention_heads": self.heads,
            "head_dim": self.head,
            "hidden_act": "silu",
            "attention_bias": self.biases[0],
            "mlp_bias": self.biases[1],
            "block_configs": blocks,
        }

    def _rotary(self) -> dict[str, Any]:
        """The base of rotary positions and what scales them, under the names of transformers 5 and of all others."""
        found = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        base = found.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
        scaled = {"rope_scaling": {"rope_type": kind, **found}} if kind != "default" else {}
        return {"rope_theta": base, "rope_parameters": {"rope_theta": base, "rope_type": kind, **found}} | scaled

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Tensor | None, int]]:
        """Of the layers: name, shape there, and where the model's own rows (dim 0) or columns (dim 1) stand in it.

        None for the places: it is as it is in the model.
        """
        hidden = int(self.config["hidden_size"])
        for index, layer in enumerate(self.layers):
            at = f"model.layers.{index}"
            if layer.key_heads:
                yield f"{at}.input_layernorm.weight", (hidden,), None, 0
                size = self.heads // layer.key_heads
                own = layer.heads // layer.keys if layer.keys else 0
                queries = self._heads(torch.arange(layer.keys)[:, None] * size + torch.arange(own))
                kept = self._heads(torch.arange(layer.keys))
                wide, few = self.heads * self.head, layer.key_heads * self.head
                for part, rows, places in (("q", wide, queries), ("k", few, kept), ("v", few, kept)):
                    yield f"{at}.self_attn.{part}_proj.weight", (rows, hidden), places, 0
                    if self.biases[0]:
                        yield f"{at}.self_attn.{part}_proj.bias", (rows,), places, 0
                yield f"{at}.self_attn.o_proj.weight", (hidden, wide), queries, 1
                if self.biases[0]:
                    yield f"{at}.self_attn.o_proj.bias", (hidden,), None, 0
            if layer.channels:
                yield f"{at}.post_attention_layernorm.weight", (hidden,), None, 0
                places = torch.arange(layer.width)
                for part in ("gate", "up"):
                    yield f"{at}.mlp.{part}_proj.weight", (layer.channels, hidden), places, 0
                    if self.biases[1]:
                        yield f"{at}.mlp.{part}_proj.bias", (layer.channels,), places, 0
                yield f"{at}.mlp.down_proj.weight", (hidden, layer.channels), places, 1
                if self.biases[1]:
                    yield f"{at}.mlp.down_proj.bias", (hidden,), None, 0

    def _heads(self, which: Tensor) -> Tensor:
        """The rows of these heads."""
        return (which.flatten()[:, None] * self.head + torch.arange(self.head)).flatten()


def _key_heads(most: int, queries: int, keys: int) -> int:
    """As few key heads as divide `most` query heads, hold `keys`, and give each as many queries as it has."""
    return next(n for n in range(keys, most + 1) if most % n == 0 and most // n >= queries // keys)


def _why_not(finished: Finished) -> str:
    try:
        shape = Deci.read(finished.folder)
        known = {name for name, *_ in shape.tensors()}
        gone = ("input_layernorm.weight", "post_attention_layernorm.weight")  # of parts that are not there
        for name in Checkpoint(finished.folder):
            if ".layers." in name and name not in known and not name.endswith(gone):
                return f"DeciLM has no place for {name}"
    except (ValueError, KeyError, StopIteration) as error:
        return str(error) or "its numbers of heads cannot be told as DeciLM's"
    return ""


def _write(folder: Path, target: Path) -> None:
    shape, stored = Deci.read(folder), Checkpoint(folder)
    places = {name: (size, where, dim) for name, size, where, dim in shape.tensors()}
    dtype = stored.tensor(next(iter(stored))).dtype

    def placed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in places:
            return {} if ".layers." in name else {name: tensor}
        size, where, dim = places[name]
        if where is None:
            return {name: tensor}
        return {name: torch.zeros(size, dtype=tensor.dtype).index_copy(dim, where, tensor)}

    more = {name: torch.zeros(size, dtype=dtype) for name, (size, *_) in places.items() if name not in stored}
    without = ["config.json", "structure.json", "modeling_*.py"]
    rewrite(folder, target, placed, more=more, without=without)
    (target / MODULE).write_text(CONFIG, encoding="utf-8")
    if (card := target / "README.md").is_file():
        text = card.read_text(encoding="utf-8").replace("library_name: transformers\n", "")
        card.write_text(re.sub(r"(?<=## Load it\n\n)```.*?```", LOADED, text, flags=re.S), encoding="utf-8")
    write_json(target / "config.json", shape.told())


def _differences(folder: Path, target: Path) -> list[str]:
    """What is read back, without its zeros, beside the model."""
    shape, stored, written = Deci.read(folder), Checkpoint(folder), Checkpoint(target)
    found = []
    places = {name: (size, where, dim) for name, size, where, dim in shape.tensors()}
    outside = {name: (stored.shape(name), None, 0) for name in stored if ".layers." not in name}
    for name, (size, where, dim) in {**outside, **places}.items():
        if name not in written or written.shape(name) != tuple(size):
            found.append(f"{name} is not there, or not {tuple(size)}")
            continue
        tensor = written.tensor(name)
        own = tensor if where is None else tensor.index_select(dim, where)
        if name in stored and not torch.equal(own, stored.tensor(name)):
            found.append(f"{name} is not the model's")
        filled = int(stored.tensor(name).count_nonzero()) if name in stored else 0
        if int(tensor.count_nonzero()) != filled:
            found.append(f"{name} has other numbers than zeros beside the model's")
    return found
