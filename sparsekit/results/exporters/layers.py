"""A model as llama.cpp counts it: its architecture there, and the numbers of each of its layers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a config's model_type -> the architecture in llama.cpp, and whether its rotary halves are interleaved there
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
BLOCK = 32  # weights of a quantized type that share a scale; a row must be made of whole ones
OURS = "sparsekit_"  # before the family's name in the config of a model whose layers differ in width


@dataclass(frozen=True)
class Shape:
    """A model as llama.cpp counts it; numbers by layer. permuted: whether its rotary halves are interleaved there.

    zeros: tensors that the model does not have, by their names in the file, (out, in): llama.cpp reads the size of a
        head from the first layer, and passes over a layer without MLP whole; so there an attention of one head, or an
        MLP of 32 channels, that gives nothing stands for what was removed
    """

    architecture: str
    permuted: bool
    heads: list[int]
    key_heads: list[int]
    widths: list[int]
    head: int
    config: dict[str, Any]
    zeros: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Of a checkpoint. ValueError, a sentence, for what llama.cpp is not known to run."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config.get("model_type"))
        family = kind.removeprefix(OURS)
        if family not in FAMILIES:
            raise ValueError(f"models of type {kind} are not written as GGUF; {', '.join(FAMILIES)} are")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"llama.cpp runs this family with silu, and the config has {config['hidden_act']}")
        architecture, permuted = FAMILIES[family]
        count = config["num_hidden_layers"]
        layers = config.get("per_layer_config") or {}

        def by_layer(key: str) -> list[int]:
            return [int((layers.get(str(index)) or {}).get(key, config[key])) for index in range(count)]

        heads, key_heads, widths = map(by_layer, ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
        if len({*zip(heads, key_heads, widths, strict=True)}) > 1:
            if architecture != "llama":
                raise ValueError(
                    f"llama.cpp has layers of unequal widths for LLaMA alone (as deci), not for {family}: cut with "
                    "`shape: uniform`"
                )
            architecture = "deci"
        head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        zeros: dict[str, tuple[int, int]] = {}
        if not heads[0]:
            heads[0] = key_heads[0] = 1
            zeros |= {f"blk.0.attn_{part}.weight": (head, hidden) for part in "qkv"}
            zeros["blk.0.attn_output.weight"] = (hidden, head)
        for layer in (layer for layer, width in enumerate(widths) if not width and heads[layer]):
            widths[layer] = BLOCK
            zeros |= {f"blk.{layer}.ffn_{part}.weight": (BLOCK, hidden) for part in ("gate", "up")}
            zeros[f"blk.{layer}.ffn_down.weight"] = (hidden, BLOCK)
        found = cls(architecture, permuted, heads, key_heads, widths, head, config, zeros)
        found.rope()
        if config.get("use_sliding_window") or (config.get("sliding_window") and family not in ("mistral", "qwen2")):
            raise ValueError("llama.cpp would not slide the window of its attention, so longer texts would differ")
        return found

    @property
    def context(self) -> int:
        """Tokens that it may be given; no more than the window of its attention, which llama.cpp does not slide."""
        positions = int(self.config["max_position_embeddings"])
        window = self.config.get("sliding_window")
        if window is None or not self.config.get("use_sliding_window", True):
            return positions
        return min(positions, int(window))

    def rope(self) -> tuple[float, dict[str, Any]]:
        """The base of the rotary embedding, and the scaling of its frequencies."""
        told = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        base = told.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        kind = told.get("rope_type", told.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"the rotary embedding is scaled by {kind}, which the exporter does not write")
        return float(base), told | {"rope_type": kind}

    def factors(self) -> Tensor | None:
        """What llama3 divides each frequency by (head / 2,); None without that scaling (Llama 3.1's own formula)."""
        base, told = self.rope()
        if told["rope_type"] != "llama3":
            return None
        frequency = 1.0 / base ** (torch.arange(0, self.head, 2, dtype=torch.float64) / self.head)
        length = 2 * math.pi / frequency
        low, high = (
            told["original_max_position_embeddings"] / told[key] for key in ("low_freq_factor", "high_freq_factor")
        )
        share = (told["original_max_position_embeddings"] / length - told["low_freq_factor"]) / (
            told["high_freq_factor"] - told["low_freq_factor"]
        )
        between = 1 / ((1 - share) / told["factor"] + share)
        found = between.where(length <= low, torch.as_tensor(float(told["factor"]), dtype=torch.float64))
        return found.where(length >= high, torch.ones((), dtype=torch.float64)).float()
