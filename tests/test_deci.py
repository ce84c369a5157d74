"""The exporter deci: layers of unequal widths, with zeros for what is missing, run by transformers' own layers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import sparsekit
from sparsekit.contracts import Finished
from sparsekit.model import find_blocks, save_model
from sparsekit.model.checkpoint import Checkpoint
from sparsekit.model.structure import Removal, Shape, choose, find_units
from sparsekit.model.structure.nothing import Nothing
from sparsekit.results.exporters.deci import Deci, deci

TINY = Path(__file__).parent / "models" / "tiny-llama"
SIZES = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"intermediate_size": 600, "vocab_size": 768, "max_position_embeddings": 256}
IDS = torch.arange(2, 26)[None]


def unequal(folder: Path, family: str = "Llama", **settings: Any) -> nn.Module:
    """Heads and channels of each layer, an attention in the first layer and in the third, and an MLP are gone."""
    _, tokenizer = sparsekit.load(TINY)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    cuts = []
    gone = {("attention", 0), ("attention", 2), ("mlp", 1)}
    for kinds in (["heads", "channels"], ["attention", "mlp"]):
        blocks = find_blocks(model)
        units = find_units(model, blocks, kinds)
        scores = torch.rand(len(units), generator=torch.Generator().manual_seed(2)).double()
        kept = (
            choose(units, scores, 0.3)
            if "heads" in kinds
            else torch.tensor([(p.kind, p.block) not in gone for p in units.parts])
        )
        cuts.append((units, Removal(units.kinds, kept)))
        cuts[-1][1].apply(model, blocks)
    save_model(model, tokenizer, folder, Shape.of(model, cuts))
    return model


def of_layers(folder: Path) -> nn.Module:
    """A model of transformers' own decoder layers, each as wide as its entry in `block_configs` says."""
    told = json.loads((folder / "config.json").read_text())
    wanted = {
        key: told[key] for key in ("hidden_size", "num_attention_heads", "vocab_size", "rms_norm_eps", "head_dim")
    }
    wanted |= {"rope_parameters": told["rope_parameters"], "attention_bias": told["attention_bias"]}
    config = transformers.LlamaConfig(**wanted, num_hidden_layers=len(told["block_configs"]))
    model = transformers.LlamaForCausalLM(config).eval()
    for index, block in enumerate(told["block_configs"]):
        own = copy.copy(config)
        if not block["attention"]["no_op"]:
            own.num_key_value_heads = config.num_attention_heads // block["attention"]["n_heads_in_group"]
        if not block["ffn"]["no_op"]:
            width = int(2 * block["ffn"]["ffn_mult"] * config.hidden_size / 3)
            own.intermediate_size = -(-width // 256) * 256
        layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer(own, index)
        if block["attention"]["no_op"]:
            layer.self_attn, layer.input_layernorm = Nothing(index), nn.Identity()
        if block["ffn"]["no_op"]:
            layer.mlp, layer.post_attention_layernorm = Nothing(), nn.Identity()
        model.model.layers[index] = layer
    stored = Checkpoint(folder)
    model.load_state_dict({name: stored.tensor(name) for name in stored}, strict=True)
    return model


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}),
    ],
    ids=["llama", "biases", "qwen2"],
)
def test_it_computes_the_same(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = unequal(tmp_path / "model", family, **settings)
    finished = Finished(tmp_path / "model", {}, {}, dict, {})
    assert not deci().why_not(finished)
    deci().write(finished, tmp_path / "deci")
    assert deci().differences(finished, tmp_path / "deci") == []
    told = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert told["rope_theta"] == told["rope_parameters"]["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert not list((tmp_path / "deci").glob("modeling_*")) and not (tmp_path / "deci" / "structure.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(of_layers(tmp_path / "deci")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_number_that_is_another_is_seen(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    unequal(tmp_path / "model", tie_word_embeddings=False)
    finished = Finished(tmp_path / "model", {}, {}, dict, {})
    deci().write(finished, tmp_path / "deci")
    file = tmp_path / "deci" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][0, -1] = 1.0  # a channel that the model does not have
    tensors["model.layers.4.self_attn.q_proj.weight"][0] *= 2
    save_file(tensors, file)
    assert deci().differences(finished, tmp_path / "deci") == [
        "model.layers.3.mlp.down_proj.weight has other numbers than zeros beside the model's",
        "model.layers.4.self_attn.q_proj.weight is not the model's",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "gpt2"}, "models of type gpt2 cannot be told as DeciLM"),
        ({"hidden_act": "gelu"}, "is run with silu"),
        ({"model_type": "mistral", "sliding_window": 64}, "does not slide the window"),
    ],
)
def test_what_it_cannot_say_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    unequal(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert said in deci().why_not(Finished(tmp_path / "model", {}, {}, dict, {}))


@pytest.mark.parametrize("stage", ["wanda-sp", "fisher"])
def test_what_is_cut_for_serving_needs_no_zeros(stage: str, tmp_path: Path) -> None:
    """600 channels: two times 256, and 88 that go before the others do."""
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 8}, tie_word_embeddings=False)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    _, tokenizer = sparsekit.load(TINY)
    text = torch.randint(2, 700, (8, 32), generator=torch.Generator().manual_seed(1))
    before = sum(parameter.numel() for parameter in model.model.layers.parameters())
    stages = [{stage: {"remove": "40%", "shape": "serving"}}]
    result = sparsekit.prune(model, tokenizer, stages=stages, calibration=text)
    assert result.verified
    folder = result.save(tmp_path / "run") / "model"
    told = json.loads((folder / "config.json").read_text())["per_layer_config"]
    assert {layer.get("intermediate_size", 600) for layer in told.values()} <= {0, 256, 512, 600}
    assert {layer.get("num_key_value_heads", 4) for layer in told.values()} <= {0, 4}
    assert sum(p.numel() for p in result.model.model.layers.parameters()) <= 0.6 * before
    layers = Deci.read(folder).layers
    assert all(layer.channels == layer.width or layer.width == 600 for layer in layers)
    assert all(layer.key_heads == layer.keys for layer in layers[1:])  # the first one has zeros if its attention went


def test_its_card_says_how_it_is_run(tmp_path: Path) -> None:
    unequal(tmp_path / "model", tie_word_embeddings=False)
    said = "# A model\n\n## Load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n```\n\n## Recipe\n"
    (tmp_path / "model" / "README.md").write_text(said)
    deci().write(Finished(tmp_path / "model", {}, {}, dict, {}), tmp_path / "deci")
    card = (tmp_path / "deci" / "README.md").read_text()
    assert "vllm serve FOLDER --trust-remote-code" in card and "AutoModel" not in card and "## Recipe" in card


def test_the_worst_channels_go_by_256_from_the_worst() -> None:
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    blocks = find_blocks(transformers.LlamaForCausalLM(config))
    units = find_units(transformers.LlamaForCausalLM(config), blocks, ["channels"])
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(3)).double()
    kept = choose(units, scores, 0.2, shape="serving")
    for each, mine in zip(units.split(kept), units.split(scores), strict=True):
        left = int(each.sum())
        assert left in (256, 512, 600) and (left == 600 or mine[each].min() >= mine[~each].max())
    assert units.removed(kept) >= 0.2
