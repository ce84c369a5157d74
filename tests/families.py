"""Small randomly initialised models of the families that sparsekit is proved on."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GROUPED = WIDTH | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED | {"tie_word_embeddings": True},
    "Mistral": GROUPED | {"sliding_window": 8},
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma3": GROUPED
    | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "OPT": WIDTH | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "GPTNeoX": WIDTH | {"intermediate_size": 48},
    "Phi": WIDTH | {"intermediate_size": 48, "partial_rotary_factor": 0.5},
    "Mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
NAMES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}
GATED = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
# what each block's groups must be, in call order, by the last part of the name
GROUPS = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen3", "Gemma", "Gemma3"), GATED),
    "OPT": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "GPT2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "GPTNeoX": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "Phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],  # parallel: one normalised input for all
    "Mixtral": GATED[:2] + 4 * GATED[2:],
}


def build(family: str, device: str = "cpu", settings: dict[str, Any] | None = None) -> nn.Module:
    """A random model of the family, in eval mode, weights large enough that blocks matter."""
    import transformers

    config_name, model_name = NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**(settings or SETTINGS[family]))
    with torch.device(device):
        model = getattr(transformers, model_name)(config).eval()
    if device != "meta":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name:
                    parameter.mul_(5)
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model


def committing(folder: Path, model: nn.Module) -> Any:
    """Where blocks of the model are committed, under `folder`: what a run has, around a model in memory."""
    from sparsekit.model import Weights, find_blocks, split_experts
    from sparsekit.walk import Commits

    split_experts(model)
    commits = Commits(folder / "blocks", Weights(folder / "weights", model))
    commits.prepare(find_blocks(model))
    return commits
