import copy
import json
from functools import cache
from pathlib import Path

import pytest
import sparsekit
import torch
import transformers
from safetensors.torch import load_file, save_file
from sparsekit import cli
from sparsekit.data import calibration_tokens
from sparsekit.measure import perplexity, perplexity_windows
from sparsekit.model import load_plain, load_tokenizer
from sparsekit.testing import begin, context

from sparsekit_slicegpt import Sliced, slice_to, slicegpt

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
def test_sizes_and_a_cut_of_directions_that_are_not_used(family, tmp_path):
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
    slicegpt(
        context(model, TEXT, tmp_path, batch=3), cut="20%"
    )  # 25.6 of 32: 24, and LayerNorm's means take one direction more
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    layers = [module for module in model.modules() if isinstance(module, Sliced)]
    assert [tuple(layer.attention_shortcut.shape) for layer in layers] == [(24, 24)] * 2
    assert [tuple(layer.mlp_shortcut.shape) for layer in layers] == [(24, 24), (24, 32)]
    assert layers[0].self_attn.q_proj.weight.shape == (32, 24) and layers[0].self_attn.q_proj.in_features == 24
    assert model.get_input_embeddings().weight.shape == (64, 24)


RECIPE = """\
model: {model}
calibration: {{source: python-docs, samples: 8, length: 32}}
stages: [{{slicegpt: {{cut: "25%"}}}}]
evaluate: {{perplexity: [{{source: python-docs, windows: 4}}], length: 64}}
output: {output}
keep: true
"""


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_a_recipe_slices_saves_proves_and_the_result_generates(name, tmp_path, capsys):
    file = tmp_path / "slice.yaml"
    file.write_text(RECIPE.format(model=MODELS / name, output=tmp_path / "run"))
    assert cli.main(["fit", "--recipe", str(file)]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        report["verified"] is True and report["notes"]["slicegpt"]["width"][0] < report["notes"]["slicegpt"]["width"][1]
    )
    model, _ = load_plain(MODELS / name)
    tokens = calibration_tokens({"source": "python-docs", "samples": 8, "length": 32, "seed": 0}, _, 256, 768)
    slicegpt(context(model, tokens, tmp_path / "other", batch=8), cut="25%")
    again, tokenizer = sparsekit.load(tmp_path / "run")
    assert len(tokenizer) > 500
    with torch.no_grad():  # the run's stage and a call of it give the same model
        assert torch.equal(model(input_ids=TEXT).logits, again(input_ids=TEXT).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert again.generation_config.pad_token_id == model.generation_config.pad_token_id is not None
    cached, bare = (again.generate(TEXT[:2], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, bare)
    folder = tmp_path / "run" / "model"
    with pytest.raises(ValueError, match="sparsekit_slicegpt"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)  # not filled with random numbers
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["eval", str(folder), "--perplexity", "python-docs", "--windows", "1", "--length", "32"]) == 0
    assert cli.main(["bench", str(folder), "--repeat", "1", "--new", "2", "--prompt", "8", "--batch", "1"]) == 0
    assert "x as fast" in capsys.readouterr().out
    assert cli.main(["verify", str(folder), "--against", str(MODELS / name)]) == 2
    assert "was resized by `slicegpt`" in capsys.readouterr().err
    tensors = load_file(folder / "model.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["verify", str(folder)]) == 1


def test_what_it_made_is_rebuilt_on_a_resume(tmp_path, monkeypatch, capsys):
    file = tmp_path / "slice.yaml"
    file.write_text(RECIPE.format(model=MODELS / "tiny-llama", output=tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparsekit.run.result.write_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left"))
        )
        assert cli.main(["fit", "--recipe", str(file)]) == 1
    monkeypatch.setattr("sparsekit_slicegpt.slice_to", lambda *_, **__: pytest.fail("sliced again"))
    assert cli.main(["fit", "--recipe", str(file), "--resume"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("stages", ['[{slicegpt: {cut: "25%"}}, wanda]', "[wanda, slicegpt]"])
def test_nothing_comes_beside_it(stages, tmp_path, capsys):
    file = tmp_path / "slice.yaml"
    file.write_text(RECIPE.format(model=MODELS / "tiny-llama", output=tmp_path / "run"))
    assert cli.main(["fit", "--recipe", str(file), "--set", f"stages={stages}", "pattern=50%"]) == 2
    assert "the width between blocks" in capsys.readouterr().err


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
        slicegpt(context(build("Llama"), TEXT, tmp_path), cut="80%")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    with pytest.raises(ValueError, match="a model of type gpt2 cannot be sliced; llama"):
        slicegpt(context(transformers.GPT2LMHeadModel(config), TEXT, tmp_path), cut="25%")
    with pytest.raises(ValueError, match=r"option `cut` is '130%'"):
        begin(slicegpt, context(build("Llama"), TEXT, tmp_path), cut="130%")


def test_the_width_is_exact():
    """80 % of 640 leaves 128; 1 - 0.8 in floats leaves 127.99..."""
    from fractions import Fraction

    from sparsekit.contracts import share

    assert int((1 - Fraction(repr(share("80%")))) * 640) == 128 and int((1 - share("80%")) * 640) == 127
