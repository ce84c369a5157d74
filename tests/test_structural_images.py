"""Heads, channels and layers taken out of vision models: the rest computes what the dense model does without them."""

import json

import pytest
import torch
import transformers
from test_images import TINY, digits  # noqa: F401 (a fixture)
from test_run import fit

import sparsekit
from sparsekit.measure.images import labelled_images
from sparsekit.model import load_plain
from sparsekit.model.structure import Shape

HEADS, CHANNELS = 4, 96


@pytest.fixture
def recipe(tmp_path, digits):  # noqa: F811
    file = tmp_path / "vit.yaml"
    file.write_text(
        f"model: {TINY}\nstages: [{{wanda-sp: {{remove: 30%}}}}]\noutput: {tmp_path / 'run'}\n"
        f"calibration: {{source: images, path: {digits}, samples: 32, batch: 16}}\n"
    )
    return file


def masked(shape: Shape) -> torch.nn.Module:
    """The dense model without the heads, channels and layers that are gone, by zeros."""
    model, _ = load_plain(TINY)
    left = {layer.index: layer for layer in shape.layers}
    with torch.no_grad():
        for index, block in enumerate(model.vit.layers):
            size = block.attention.o_proj.weight.shape[1] // HEADS
            heads = set(range(HEADS)) - set(left[index].heads.units if index in left else ())
            for head in heads:
                block.attention.o_proj.weight[:, head * size : (head + 1) * size] = 0
            channels = set(range(CHANNELS)) - set(left[index].channels.units if index in left else ())
            block.mlp.fc2.weight[:, sorted(channels)] = 0
            if index not in left:
                block.attention.o_proj.bias.zero_()
                block.mlp.fc2.bias.zero_()
    return model


@pytest.mark.parametrize(
    "stage",
    [
        "{wanda-sp: {remove: 30%}}",
        pytest.param("{flap: {remove: 30%, bias: false}}", marks=pytest.mark.long),
        "{block-influence: {remove: 25%}}",
        "{llm-pruner: {remove: 30%}}",
        "{policy_gradient: {remove: 30%, steps: 4, compensate: false}}",
        "{policy_gradient: {remove: 25%, units: layers, steps: 4}}",
    ],
)
def test_what_is_left_computes_the_same(tmp_path, recipe, digits, stage):  # noqa: F811
    done = fit(recipe, "--set", f"stages=[{stage}]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    assert report["verified"] is True
    model, processor = sparsekit.load(str(folder))
    assert sum(p.numel() for p in model.parameters()) == report["structure"]["parameters"]["pruned"] < 65_000
    pixels = labelled_images(str(digits)).pixels(list(range(16)), processor, 1)
    with torch.no_grad():
        expected = masked(Shape.read(folder / "model"))(pixel_values=pixels).logits
        assert torch.allclose(model(pixel_values=pixels).logits, expected, atol=1e-4)


def test_equal_layers_are_opened_by_plain_transformers(tmp_path, recipe):
    stages = "stages=[{wanda-sp: {remove: 20%, units: channels}}, sparsegpt]"
    done = fit(recipe, "--set", stages, "pattern=2:4")
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    width = model.config.intermediate_size
    assert width < CHANNELS and model.vit.layers[0].mlp.fc1.weight.shape[0] == width
    assert (model.vit.layers[0].mlp.fc1.weight.reshape(-1, 4) == 0).sum(1).ge(2).all()


def test_what_needs_text_is_refused(recipe):
    for stage in ("layer-perplexity", "reap"):
        done = fit(recipe, "--set", f"stages=[{{{stage}: {{remove: 20%}}}}]")
        assert done.returncode == 2 and "sees images" in " ".join(done.stderr.split())


def test_policy_gradient_finds_what_a_brute_force_finds(digits):  # noqa: F811
    """With two of four layers of a small model to go, the choice is in the better half by the distance of features."""
    from itertools import combinations

    from sparsekit.model import features
    from sparsekit.train.features import feature_distance

    model, processor = load_plain(TINY)
    pixels = labelled_images(str(digits)).pixels(list(range(40)), processor, 1)
    layers = list(model.vit.layers)
    result = sparsekit.prune(
        model,
        processor,
        stages=[{"policy_gradient": {"remove": "50%", "units": "layers", "steps": 200, "batch": 8}}],
        calibration=pixels,
        copy=True,
    )
    kept = set(result.report["structure"]["layers"]) if "structure" in result.report else set()
    with torch.no_grad():
        dense = features(model, pixels)[1]
        found = {}
        for chosen in combinations(range(len(layers)), len(layers) // 2):
            model.vit.layers = torch.nn.ModuleList(layers[index] for index in chosen)
            found[chosen] = float(feature_distance(features(model, pixels)[1], dense).mean())
    order = sorted(found, key=found.__getitem__)
    assert len(kept) == len(layers) // 2 and order.index(tuple(sorted(kept))) < 3


def test_llm_pruner_by_finite_differences(digits):  # noqa: F811
    """The gradient that scores are made of is the loss's: of the class that the model finds likeliest."""
    from torch.nn.functional import cross_entropy

    from sparsekit.train.whole import loss_of_images

    model, processor = load_plain(TINY)
    pixels = labelled_images(str(digits)).pixels(list(range(4)), processor, 1)
    logits = model(pixel_values=pixels).logits
    own = cross_entropy(logits, logits.argmax(1), reduction="sum")
    assert float(loss_of_images(model, pixels).detach()) == pytest.approx(float(own.detach()))
    bare = model.vit
    states = bare(pixel_values=pixels).last_hidden_state
    energy = states.square().sum(-1).mean(1).sum() / 2
    assert float(loss_of_images(bare, pixels).detach()) == pytest.approx(float(energy.detach()), rel=1e-5)


def test_bench_of_images(tmp_path, recipe, digits, capsys):  # noqa: F811
    """Seconds an image, beside the model that the run was made from, in the table, the report and the page."""
    from sparsekit import cli

    assert fit(recipe, "--set", f"evaluate={{accuracy: [{{path: {digits}, limit: 20}}]}}").returncode == 0
    run = str(tmp_path / "run")
    assert cli.main(["bench", run, "--batch", "1", "4", "--repeat", "2", "--save"]) == 0
    printed = capsys.readouterr().out
    assert "an image, batch 4" in printed and "prefill" not in printed and "seeing" in printed
    speed = json.loads((tmp_path / "run" / "report.json").read_text())["speed"]
    assert speed["models"][0]["images_seconds"]["4"] > 0 and set(speed["faster"]) == {"images"}
    assert "seeing images" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(["compare", run]) == 0 and "images" in capsys.readouterr().out
    assert cli.main(["bench", run, "--backend", "llama.cpp", "--batch", "1"]) == 2
    assert "sees images, and llama.cpp is for language models" in " ".join(capsys.readouterr().err.split())
