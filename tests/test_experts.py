"""Fused experts as linears: the model's own forward pass, views, statistics of the tokens that each expert sees."""

import copy

import pytest
import torch
import transformers
from test_walk import TOKENS as WALKED
from test_walk import prune
from torch import nn

import sparsekit
from sparsekit.maths import NM
from sparsekit.model import Experts, adopt, discover, first_inputs, join_experts, joined, split_experts
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.system import ActivationStore
from sparsekit.walk import BlockStream
from sparsekit.walk.stream import ERROR_CORRECTIONS
from sparsekit.walk.turns import in_turns

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FOUR = {"num_experts_per_tok": 2}
LATENT = {
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
# one family for each form that fused experts have
FORMS = {
    "Mixtral": BASE | FOUR | {"num_local_experts": 4, "intermediate_size": 16},  # gate and up below one another
    "GptOss": BASE | FOUR | {"num_local_experts": 4, "intermediate_size": 16},  # transposed, in turns, biases, clamped
    "NemotronH": BASE
    | FOUR
    | {"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_group": 1}
    | {"topk_group": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
    | {"layers_block_type": ["moe", "attention", "moe"], "intermediate_size": 48},  # no gate
    "DeepseekV3": BASE
    | FOUR
    | LATENT
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
    | {"intermediate_size": 48, "num_key_value_heads": 4},  # the first block is dense
    "Llama4Text": BASE
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size": 16}
    | {"intermediate_size_mlp": 32},  # every expert is given all tokens, zeros where not sent
    "Dbrx": {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "pad_token_id": 0}
    | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
    | {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "LongcatFlash": BASE
    | LATENT
    | {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2}
    | {"zero_expert_num": 2, "num_key_value_heads": 4},  # some experts give back what they are given
    "JetMoe": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "kv_channels": 8},
}
NAMES = {"Llama4Text": ("Llama4TextConfig", "Llama4ForCausalLM")}
TOKENS = torch.randint(1, 96, (6, 24), generator=torch.Generator().manual_seed(1))


def model_of(family: str, device: str = "cpu") -> nn.Module:
    config_name, model_name = NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**FORMS[family])
    with torch.device(device):
        model = getattr(transformers, model_name)(config).eval()
    if device == "meta":
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "conv" not in name:
                parameter.normal_(std=0.15)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FORMS)
def test_the_split_model_is_the_model(family):
    model = model_of(family)
    own, count, names = logits(model), sum(p.numel() for p in model.parameters()), set(model.state_dict())
    split_experts(model)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert experts and sum(p.numel() for p in model.parameters()) == count
    assert not any(parameter.dim() == 3 for name, parameter in model.named_parameters() if "spare" not in name)
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    for each in experts:
        each.watched = True  # others are shown tokens that nothing is used of
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    model.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    linear = next(m for m in experts[0].modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        linear.weight.zero_()
    assert (logits(model) - own).abs().max() > 1e-4
    torch.testing.assert_close(logits(twin), own, rtol=1e-4, atol=1e-5)
    changed = logits(model)
    with joined(model):
        assert set(model.state_dict()) == names
        torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-5)
    join_experts(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FORMS)
def test_the_walk_is_the_models_own_forward_pass(family):
    model = model_of(family)
    seen = []
    blocks = discover(model, TOKENS[:1, :8])
    hook = blocks[-1].module.register_forward_hook(lambda _, __, out: seen.append(out))
    logits(model)
    hook.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    chunks = []
    for hidden in first_inputs(model, blocks, TOKENS, batch=2):
        for block in blocks:
            hidden = block(hidden)
        chunks.append(hidden)
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FORMS)
def test_every_expert_is_a_linear_of_its_block_on_meta_too(family):
    model, bare = model_of(family), model_of(family, "meta")
    bare.to(torch.bfloat16)
    found = discover(bare, torch.zeros(1, 8, dtype=torch.long, device="meta"))
    blocks = adopt(model, found)
    weights = {id(linear.module.weight) for block in blocks for linear in block.linears.values()}
    for block in blocks:
        assert {name for group in block.groups for name in group} == set(block.linears)
        for experts in block.experts.values():
            for module in experts.modules():
                assert not isinstance(module, nn.Linear) or id(module.weight) in weights
        for name in block.linears:
            assert "router" not in name and not name.endswith(".gate"), name
    here = discover(model_of(family), TOKENS[:1, :8])
    assert [sorted(map(sorted, block.groups)) for block in here] == [sorted(map(sorted, b.groups)) for b in found]


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4Text"])
def test_the_gram_is_that_of_the_experts_tokens_and_of_some_others(family):
    """Against a float64 loop over what the fused module was given: each token counts by the router's weight."""
    model = model_of(family)
    blocks = discover(model, TOKENS[:1, :8])
    block, given = blocks[0], []
    experts = block.experts["mlp.experts" if family != "Llama4Text" else "feed_forward.experts"]
    handle = experts.register_forward_pre_hook(lambda _, args: given.append(args))
    store = ActivationStore(10**9)
    for hidden in first_inputs(model, blocks, TOKENS, batch=3):
        store.append(hidden)
    found = {name: stats for names, stats in BlockStream(blocks, store).statistics(block) for name in names}
    handle.remove()
    assert len(given) == 2
    for index in range(4):
        rows: list[torch.Tensor] = []
        routed = 0
        for tokens, *sent in given:
            if family == "Llama4Text":  # each token as the expert that it is sent to has it
                parts = tokens.view(4, -1, 32)
                mine = [row for row in parts[index] if row.any()]  # the router's score is in them
                usual = 1.0
                everyone = [next(row for row in parts[:, place] if row.any()) for place in range(parts.shape[1])]
            else:
                everyone = list(tokens.reshape(-1, 32))
                weighed = zip(everyone, *sent, strict=True)
                mine = [row.double() * w[list(chosen).index(index)] for row, chosen, w in weighed if index in chosen]
                usual = sent[1].double().square().mean().sqrt()
            count = round(len(everyone) * 32 / TOKENS.numel())  # as many as inputs, of all tokens
            first = index * len(everyone) // 4
            others = [everyone[(i * len(everyone) // count + first) % len(everyone)] for i in range(count)]
            rows += [row.double() for row in mine] + [row.double() * usual for row in others]
            routed += len(mine)
        stacked = torch.stack(rows)
        linear = experts.get_submodule(f"{index}.up_proj")
        name = next(name for name, each in block.linears.items() if each.module is linear)
        gram = stacked.t() @ stacked
        assert (found[name].gram.double() - gram).norm() < 1e-6 * gram.norm()
        assert experts.routed[index] == routed


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_are_pruned_whatever_the_error_correction(family, mode):
    model = model_of(family)
    dense = copy.deepcopy(model)
    blocks = prune(model, sparsegpt, mode=mode)
    for block in blocks:
        for linear in block.linears.values():
            assert NM(2, 4).satisfied(linear.weight)
    a, b = logits(dense), logits(model)
    assert 0 < (a - b).square().mean() < a.square().mean()
    join_experts(model)
    torch.testing.assert_close(logits(model), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["prefix", "none"])
@pytest.mark.parametrize("family", ["Mixtral", "Llama4Text", "JetMoe"])
def test_experts_in_several_turns_are_pruned_as_in_one(family, mode):
    answers = {}
    for grams in (10**9, 20_000):
        model = model_of(family)
        seen = []
        blocks = prune(model, sparsegpt, mode=mode, grams=grams)
        for block in blocks:
            seen.append(in_turns(block, grams))
            assert sorted(group for turn in seen[-1] for group in turn) == list(range(len(block.groups)))
        assert (len(seen[0]) > 1) == (grams < 10**9)
        answers[grams] = {name: p.clone() for name, p in model.named_parameters()}
        tokens = WALKED.numel() * (1 if family == "Llama4Text" else 2)
        for block in blocks:
            assert all(sum(each) == tokens for each in block.notes["tokens"].values())
    for name, one in answers[10**9].items():
        assert torch.equal(one, answers[20_000][name]), name


def test_a_model_in_memory_has_its_own_modules_again(tmp_path):
    model = model_of("Mixtral")
    names = set(model.state_dict())
    result = sparsekit.prune(model, pattern="2:4", stages=["sparsegpt"], calibration=TOKENS)
    assert result.verified and set(model.state_dict()) == names and result.report["sparsity"]["total"] == 0.5
    pruned = {name for name in result.masks if ".experts." in name}
    assert len(pruned) == 3 * 4 * 3
    result.save(tmp_path / "run")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    weight = again.model.layers[0].mlp.experts.gate_up_proj
    assert (weight == 0).float().mean() == 0.5
