"""A tiny random model of every text family of transformers: its config's sizes made small by their names."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny-llama"
WIDTH, BLOCKS, HEADS = 64, 4, 4
# sizes by the ends of the names of fields; the first that fits counts
SIZES: tuple[tuple[str, Any], ...] = (
    (r"^vocab_size.*", 768),
    (r"^(hidden_size|n_embd|d_model|embedding_dim|word_embed_proj_dim|lru_width|mamba_d_ssm)$", WIDTH),
    (r"^attention_hidden_size$", WIDTH),
    (r"^(shared_expert_|moe_shared_expert_|moe_|shared_|expert_)(intermediate_size|ffn_hidden_size)$", 32),
    (r"^intermediate_size_mlp$", WIDTH),
    (r"^(intermediate_size|n_inner|ffn_dim|ffn_hidden_size|dim_ff)$", 2 * WIDTH),
    (r"^(num_hidden_layers|n_layer|n_layers|num_layers|num_blocks)$", BLOCKS),
    (r"^(num_attention_heads|n_head|n_heads|num_heads|attention_heads)$", HEADS),
    (r"^(num_key_value_heads|num_kv_heads|linear_num_key_heads|index_n_heads|indexer_n_heads)$", 2),
    (r"^(linear_num_value_heads|mamba_n_heads|mamba_num_heads)$", 4),
    (r"^(head_dim|mamba_d_head|mamba_head_dim|linear_key_head_dim|linear_value_head_dim|index_head_dim)$", 16),
    (r"^(qk_nope_head_dim|v_head_dim|query_pre_attn_scalar|kv_lora_rank|indexer_head_dim|linear_head_dim)$", 16),
    (r"^(qk_rope_head_dim|rotary_dim|time_step_rank|mamba_dt_rank|o_lora_rank|laurel_rank)$", 8),
    (r"^(q_lora_rank)$", 32),
    (r"^(max_position_embeddings|n_positions|max_seq_len|context_length)$", 256),
    (r"^(sliding_window|attention_window_size|attention_chunk_size|window_size)$", 64),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 8),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|moe_top_k)$", 2),
    (r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|first_k_dense_replace)$", 1),
    (r"^(num_expert_group|mamba_n_groups|n_groups|mamba_ngroups)$", 1),
    (
        r"^(mamba_d_state|state_size|ssm_state_size|index_topk|indexer_budget|chunk_size|mamba_chunk_size|block_size)$",
        16,
    ),
    (r"^(vocab_size_per_layer_input)$", 768),
    (r"^(hidden_size_per_layer_input)$", 16),
    (r"^(bos_token_id|eos_token_id)$", 0),
    (r"^pad_token_id$", 1),
    (r".*(dropout|pdrop|drop_rate)$", 0.0),
)
# what the rules cannot know; None: the family's own default stays
SPECIAL: dict[str, dict[str, Any]] = {
    "phi": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": None},
    "deepseek_v32": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4, "head_dim": None},
    "minicpm3": {"num_key_value_heads": 4},
    "axk1": {"num_key_value_heads": 4, "head_dim": None},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size": 32, "num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * BLOCKS, "intermediate_size": 128}
    | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_oss": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "intermediate_size": 64},
    "falcon": {"new_decoder_architecture": False, "num_kv_heads": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 8},
    "bamba": {"attn_layer_indices": [2], "mamba_n_heads": 8},
    "nemotron_h": {"num_hidden_layers": None},
    "deepseek_v4": {"num_key_value_heads": 1, "hc_mult": 2, "o_groups": 2, "qk_rope_head_dim": None}
    | {"partial_rotary_factor": 0.5, "sliding_window": 16},
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "hy_v4": {"num_key_value_heads": 4, "hc_mult": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
    | {"ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "olmo_hybrid": {"linear_num_key_heads": 4},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "recurrent_gemma": {"num_key_value_heads": 4},
    "xlstm": {"qk_dim_factor": 0.5, "mode": "train", "return_last_states": True},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "minimax_m2": {"rotary_dim": 16},
    "kimi_linear": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_key_value_heads": 4}
    | {"head_dim": None, "linear_num_heads": 4},
    "longcat_flash": {"num_layers": 2, "num_key_value_heads": 4, "head_dim": None, "zero_expert_num": 2},
    "bailing_hybrid": {"layer_group_size": 4, "num_key_value_heads": 4, "linear_num_heads": 4, "head_dim": None},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "attention_hidden_size": 128}
    | {"attention_head_dim": 32, "num_key_value_heads": 4, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"]}
    | {"n_mamba_heads": 8, "mamba_headdim": 16, "num_key_value_heads": 4, "use_mamba_kernels": False}
    | {"attention_hidden_size": 128, "attention_head_dim": 32},
}


def names() -> list[str]:
    """The model types of all causal language models that read text alone, by transformers itself.

    Without encoders that can be told to be decoders, and without the decoders of models of two.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    found = []
    for name in known:
        parts = getattr(CONFIG_MAPPING[name], "sub_configs", None) or {}
        kind = CONFIG_MAPPING[name]
        fields = set(getattr(kind, "__annotations__", {})) | set(dir(kind))
        two = "is_decoder" in getattr(kind, "__annotations__", {}) or "decoder_layers" in fields
        if (not parts or name in SPECIAL) and not two:  # of several parts, such as text and vision: a tower's matter
            found.append(name)
    return sorted(found)


def config(name: str) -> Any:
    """The family's config with small sizes."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    try:
        fields = kind().to_dict()
    except Exception:
        fields = {}
    fields |= dict.fromkeys(getattr(kind, "__annotations__", {})) | dict.fromkeys(getattr(kind, "attribute_map", {}))
    special = SPECIAL.get(name, {})
    given: dict[str, Any] = {}
    for field in fields:
        for pattern, size in SIZES:
            if re.fullmatch(pattern, field):
                own = fields[field]
                if field not in special and not isinstance(own, list | dict | bool):
                    given[field] = size
                break
    return kind(**given | {key: value for key, value in special.items() if value is not None})


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model in eval mode whose blocks matter: weights large enough, norms and biases not all alike."""
    from transformers import AutoModelForCausalLM

    made = config(name)
    made.dtype = dtype
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(made).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and not re.search("embed|wte|lm_head|conv", key) and parameter.std() < 0.1:
                parameter.mul_(min(5.0, 0.15 / max(float(parameter.std()), 1e-3)))
            elif key.endswith("bias") and parameter.dim() == 1:
                parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype))
        finite = model(input_ids=torch.arange(5, 21)[None]).logits.isfinite().all()
    if not finite:
        raise ValueError(f"{name} gives NaN or Inf")
    return model


def save(name: str, folder: Path) -> nn.Module:
    """Build and write it with a tokenizer."""
    model: Any = build(name)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    return model
