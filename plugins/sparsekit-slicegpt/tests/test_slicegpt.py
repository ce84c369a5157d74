import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from sparsekit.data import calibration_tokens
from sparsekit.measure import perplexity, perplexity_windows
from sparsekit.model import load_plain, load_tokenizer

from sparsekit_slicegpt import Sliced, load, save, slice_to, slicegpt

MODELS = Path(__file__).parents[3] / "tests" / "models"
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
GATED = WIDTH | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "Llama": GATED | {"tie_word_embeddings": True},
    "Qwen3": GATED | {"head_dim": 8, "attention_bias": True},
    "OPT": WIDTH | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}
TEXT = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # gains and shifts that matter
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TEXT).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_and_not_cut_it_is_the_same_model(family):
    """In float64: gains, means, shifts, tied embeddings and rotations cancel out."""
    model = build(family)
    expected = logits(model)
    slice_to(model, TEXT, 32, batch=4)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_a_cut_of_directions_that_are_not_used(family):
    """A residual stream that leaves directions empty loses nothing with them."""
    model = build(family)
    q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0][:, :22]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                parameter.copy_(q @ (q.t() @ parameter))
            elif name.endswith(("o_proj.bias", "out_proj.bias", "fc2.bias")) or (
                name.endswith("weight") and "embed" in name
            ):
                parameter.copy_(parameter @ q @ q.t())
    expected = logits(model)
    slicegpt(model, TEXT, cut="20%", batch=3)  # 25.6 of 32: 24, and LayerNorm's means take one direction more
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    layers = [module for module in model.modules() if isinstance(module, Sliced)]
    assert [tuple(layer.attention_shortcut.shape) for layer in layers] == [(24, 24)] * 2
    assert [tuple(layer.mlp_shortcut.shape) for layer in layers] == [(24, 24), (24, 32)]
    assert layers[0].self_attn.q_proj.weight.shape == (32, 24) and layers[0].self_attn.q_proj.in_features == 24
    assert model.get_input_embeddings().weight.shape == (64, 24)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_it_is_saved_loaded_and_generates(name, tmp_path):
    model, tokenizer = load_plain(MODELS / name)
    text = TEXT + 100
    slicegpt(model, text, cut="25%")
    save(model, tokenizer, tmp_path / "sliced")
    again, _ = load(tmp_path / "sliced")
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, again(input_ids=text).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, bare = (again.generate(text[:2], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, bare)
    with pytest.raises(ValueError, match="sparsekit-slicegpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")  # not filled with random numbers
    assert json.loads((tmp_path / "sliced" / "config.json").read_text())["sliced_model_type"] == model.config.model_type


@cache
def texts(name):
    tokenizer = load_tokenizer(MODELS / name)
    settings = {"source": "python-docs", "samples": 16, "length": 128, "seed": 0}
    tests = perplexity_windows(
        {"perplexity": [{"source": "python-docs", "windows": 32}], "length": 128}, tokenizer, 256
    )
    return calibration_tokens(settings, tokenizer, 256, 768), *tests.values()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_principal_directions_are_better_than_random_ones(name):
    tokens, tests = texts(name)
    dense, _ = load_plain(MODELS / name)
    found = {}
    for size, principal in ((56, True), (48, True), (48, False)):
        model = copy.deepcopy(dense)
        slice_to(model, tokens, size, principal=principal)
        found[size, principal] = perplexity(model, tests, batch=8)
    assert perplexity(dense, tests, batch=8) < found[56, True] < found[48, True] < 0.5 * found[48, False], found


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="leaves fewer than 8 of 32 directions"):
        slicegpt(build("Llama"), TEXT, cut="80%")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    with pytest.raises(ValueError, match="a model of type gpt2 cannot be sliced; llama"):
        slicegpt(transformers.GPT2LMHeadModel(config), TEXT, cut="25%")
    with pytest.raises(ValueError, match="holds no model that sparsekit-slicegpt has saved"):
        load(MODELS / "tiny-llama")
