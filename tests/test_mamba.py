"""Structures of Mambas, and norms over all heads or channels: masked, cut and chained."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import sparsekit
from sparsekit.cli import main
from sparsekit.model import find_blocks, save_model
from sparsekit.model.structure import Removal, Shape, find_units, masking
from sparsekit.model.structure.cutting import cut

TINY = Path(__file__).parent / "models" / "tiny-llama"
TOKENS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "bos_token_id": 0, "pad_token_id": 0}
MAMBA2 = SMALL | {"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8, "expand": 2}
ATTENTION = SMALL | {"intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
HYBRID = ATTENTION | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8}
HYBRID |= {"mamba_chunk_size": 8, "head_dim": 4}
MODELS = {
    "mamba": ("Mamba", SMALL | {"state_size": 8, "time_step_rank": 4}, ["mamba"]),
    "falcon mamba": ("FalconMamba", SMALL | {"state_size": 8, "time_step_rank": 4}, ["mamba"]),
    "mamba 2": ("Mamba2", MAMBA2 | {"n_groups": 1}, ["mamba"]),
    "mamba 2 in groups": ("Mamba2", MAMBA2 | {"n_groups": 4}, ["mamba"]),
    "beside attention": ("FalconH1", HYBRID | {"mamba_rms_norm": False}, ["heads", "channels", "mamba"]),
    "a norm after the gate": ("FalconH1", HYBRID | {"mamba_rms_norm": True, "mamba_n_groups": 1}, ["mamba"]),
    "norms of queries and keys": ("Olmo2", ATTENTION, ["heads", "channels"]),
    "norms before outputs": ("BitNet", ATTENTION, ["heads", "channels"]),
}


def built(name, seed=0):
    family, settings, kinds = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2 and "A_log" not in path:
                parameter.mul_(5)
    blocks = find_blocks(model)
    return model, blocks, find_units(model, blocks, kinds)


def some(units):
    kept = torch.rand(len(units), generator=torch.Generator().manual_seed(5)) > 0.4
    for part, mine in zip(units.parts, units.split(kept), strict=True):
        mine[-max(1, part.least) :] = True
    return kept


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def greedy(model, use_cache):
    return model.generate(TOKENS, max_new_tokens=10, do_sample=False, use_cache=use_cache, pad_token_id=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_computes_what_the_masked_one_computes(name):
    model, blocks, units = built(name)
    dense, kept = logits(model), some(units)
    with masking(blocks, units) as masked:
        assert torch.equal(logits(model), dense)
        masked(kept)
        expected, tokens = logits(model), greedy(model, use_cache=False)
    assert torch.equal(logits(model), dense) and (expected - dense).abs().max() > 0.01
    size = sum(p.numel() for p in model.parameters())
    cut(model, blocks, units, kept)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(greedy(model, use_cache=True), tokens)  # the caches of states fit what is left
    assert size - sum(p.numel() for p in model.parameters()) == int(units.parameters[~kept].sum())
    again = find_units(model, find_blocks(model), units.kinds)  # of a later stage
    assert len(again) == int(kept.sum()) and again.kinds == units.kinds


def test_a_masked_channel_of_a_mamba_is_one_whose_readers_have_zeros():
    """The oracle: columns of x_proj and out_proj set to zero by hand, in the weights of the dense model."""
    model, blocks, units = built("mamba")
    kept = some(units)
    with masking(blocks, units) as masked:
        masked(kept)
        expected = logits(model)
    for block, mine in zip(blocks, units.split(kept), strict=True):
        for linear in (block.module.mixer.x_proj, block.module.mixer.out_proj):
            linear.weight.data[:, ~mine] = 0
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_fewer_heads_under_a_norm_are_what_the_library_computes_for_so_many():
    """The oracle: transformers' own OLMo 2 with half as many heads, its weights taken from the whole one by hand."""
    model, blocks, units = built("norms of queries and keys")
    kept = torch.tensor([index % 2 == 0 for part in units.parts for index in range(part.count)])
    kept |= units.of("channels")
    with masking(blocks, units) as masked:
        masked(kept)
        expected = logits(model)
    fewer = MODELS["norms of queries and keys"][1] | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    small = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**fewer)).eval()
    queries = [index for index in range(32) if index // 8 % 2 == 0]  # two heads of 4 share a key
    keys = [index for index in range(16) if index // 4 % 2 == 0]
    taken = dict(model.state_dict())
    for path in list(taken):
        if any(name in path for name in ("q_proj.weight", "q_norm.weight")):
            taken[path] = taken[path][queries]
        elif any(name in path for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight")):
            taken[path] = taken[path][keys]
        elif "o_proj" in path:
            taken[path] = taken[path][:, queries]
    small.load_state_dict(taken)
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-4)


def test_a_norm_that_takes_the_mean_off_is_refused():
    model, blocks, _ = built("norms of queries and keys")
    for block in blocks:
        block.module.self_attn.q_norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="q_norm normalises all units together"):
        find_units(model, blocks, ["heads"])


PLAIN = {
    **{name: MODELS[name][:2] for name in list(MODELS)[:6]},
    "nemotron": (
        "NemotronH",
        ATTENTION
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 4}
        | {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4, "head_dim": 4},
    ),
    "bamba": (
        "Bamba",
        ATTENTION
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
        | {"attn_layer_indices": [1], "mamba_expand": 2},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_as_many_of_every_mamba_are_what_plain_transformers_opens(name, tmp_path):
    """The config says how many heads or channels are left, and the logits are those of the cut model."""
    family, settings = PLAIN[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in path:
                parameter.mul_(5)
    units = find_units(model, find_blocks(model), ["mamba"])
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(2)).double()
    count = 5 * len(units) // (8 * len(units.parts)) if family in ("Mamba", "FalconMamba") else 0  # no half: 40 of 64
    kept = torch.cat([mine >= mine.sort().values[-(count or len(mine) // 2)] for mine in units.split(scores)])
    removal = Removal(units.kinds, kept)
    removal.apply(model, find_blocks(model))
    expected = logits(model)
    save_model(model, sparsekit.load(TINY)[1], tmp_path, Shape.of(model, [(units, removal)]))
    assert Shape.read(tmp_path).layout == "plain"
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_from_the_command_line_cut_and_pruned_on(family, tmp_path, capsys):
    from tests.matrix import save

    save(family, tmp_path / "source")
    kinds = ["mamba"] if family == "mamba" else ["heads", "channels", "mamba"]
    recipe = {
        "model": str(tmp_path / "source"),
        "output": str(tmp_path / "run"),
        "calibration": {"source": "python-docs", "samples": 8, "length": 32},
        "evaluate": {"samples": False},
        "loggers": [],
        "pattern": "50%",
        "stages": [{"flap": {"remove": "20%", "units": kinds, "bias": False, "compensate": True}}, "wanda"],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fit", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "proved from disk" in capsys.readouterr().out
    model, _ = sparsekit.load(tmp_path / "run" / "model")
    dense, _ = sparsekit.load(tmp_path / "source")
    size, whole = (
        sum(p.numel() for block in find_blocks(m) for p in block.module.parameters()) for m in (model, dense)
    )
    assert 0.75 < size / whole <= 0.8
    assert all(
        abs(float((linear.weight == 0).float().mean()) - 0.5) < 0.02
        for block in find_blocks(model)
        for name, linear in block.linears.items()
        if not name.endswith("dt_proj")  # read, not called: left as it is, and the run says so
    )


def test_a_model_without_any_says_what_it_has(tmp_path, capsys):
    recipe = {"model": str(TINY), "output": str(tmp_path / "run"), "stages": [{"flap": {"remove": "20%"}}]}
    recipe["stages"][0]["flap"]["units"] = "mamba"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fit", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "has no Mamba whose linears sparsekit knows" in said and "Traceback" not in said
