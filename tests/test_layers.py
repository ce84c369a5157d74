"""Whole layers of families that count them in their own ways: masked, cut, and opened by plain transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import sparsekit
from sparsekit.model import discover, find_blocks
from sparsekit.model.storage import save_model
from sparsekit.model.structure import Removal, Shape, find_units, masking

TINY = Path(__file__).parent / "models" / "tiny-llama"
TOKENS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 32, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SMALL |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OWN = SMALL | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 6, "sliding_window": 8}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
SHARED = OWN | {"num_hidden_layers": 9, "layer_types": KINDS * 3, "num_kv_shared_layers": 3}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# class -> settings, layers that go
MODELS = {
    "Gemma4": (SHARED | {"global_head_dim": 16}, [1, 7]),
    "Gemma3n": (SHARED | {"activation_sparsity_pattern": [0.0] * 9, "laurel_rank": 4}, [0, 6]),
    "Llama4": (
        SMALL
        | {"num_hidden_layers": 5, "interleave_moe_layer_step": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
        [0, 3],
    ),
    "Bamba": (
        SMALL
        | {"num_hidden_layers": 5, "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8}
        | {"mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1},
        [0, 3],
    ),
    "RecurrentGemma": (SMALL | {"num_hidden_layers": 6, "num_key_value_heads": 4, "lru_width": 32}, [1, 2]),
    "MiniCPM3": (SMALL | LATENT | {"num_hidden_layers": 4, "num_key_value_heads": 4}, [1]),
    "Rwkv": (SMALL | {"num_hidden_layers": 8, "attention_hidden_size": 32, "rescale_every": 0}, [1, 4]),
    "DeepseekV3": (
        SMALL
        | LATENT
        | {"num_hidden_layers": 5, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        | {"n_shared_experts": 1, "num_key_value_heads": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
        [0, 3],
    ),
    "Lfm2Moe": (
        SMALL
        | EXPERTS
        | {"num_hidden_layers": 5, "num_dense_layers": 2, "num_experts": 4}
        | {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
        [1, 2],
    ),
    "Ernie4_5_Moe": (
        SMALL
        | {"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_num_experts": 4}
        | {"moe_k": 2, "moe_intermediate_size": 16, "moe_layer_interval": 1},
        [0, 2],
    ),
    "Olmo3": (SMALL | {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, [3]),
    "CTRL": ({"vocab_size": 96, "n_embd": 32, "dff": 48, "n_layer": 4, "n_head": 4}, [1]),
}
HELD = {"CTRL": "CTRLLMHeadModel"}
CONFIGS = {"Gemma4": "Gemma4TextConfig", "Gemma3n": "Gemma3nTextConfig", "Llama4": "Llama4TextConfig"}


def built(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    settings = MODELS[name][0] | more
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**settings)
    model = getattr(transformers, HELD.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_layers_go_and_plain_transformers_opens_what_is_left(name, tmp_path):
    model = built(name)
    dense = logits(model)
    blocks = discover(model, TOKENS)
    units = find_units(model, blocks, ["layers"])
    kept = torch.tensor([index not in MODELS[name][1] for index in range(len(blocks))])
    with masking(blocks, units) as masked:
        masked(kept)
        expected = logits(model)
    assert (expected - dense).abs().max() > 0.01
    removal = Removal(["layers"], kept)
    removal.apply(model, blocks)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    shape = save_model(model, tokenizer, tmp_path / "cut", Shape.of(model, [(units, removal)]))
    assert shape.layout == "plain"
    again = type(model).from_pretrained(tmp_path / "cut").eval()
    assert len(find_blocks(again)) == int(kept.sum())
    torch.testing.assert_close(logits(again), expected, atol=2e-5, rtol=1e-4)


def test_weights_that_change_while_the_model_runs_are_refused():
    with pytest.raises(ValueError, match="set rescale_every to 0"):
        discover(built("Rwkv", rescale_every=6), TOKENS)


def test_what_another_layer_reads_is_not_cut_away_unsaid():
    model = built("Gemma4")  # its sixth layer makes the keys that the last one reads
    blocks = discover(model, TOKENS)
    units = find_units(model, blocks, ["layers"])
    removal = Removal(["layers"], torch.arange(9) != 5)
    removal.apply(model, blocks)
    with pytest.raises(ValueError, match="not what its config and widths say"):
        Shape.of(model, [(units, removal)])


def test_layers_that_stay_whatever_they_are_worth_are_said():
    """Gemma 4's last layer has full attention, whatever its config says, and others read keys of layers before."""
    with pytest.warns(UserWarning, match="3 layers of Gemma4ForCausalLM, the first is model.layers.4, stay"):
        result = sparsekit.prune(built("Gemma4"), stages=[{"block-influence": {"remove": "5%"}}], calibration=TOKENS)
    assert result.verified and len(result.report["structure"]["layers"]) == 8
