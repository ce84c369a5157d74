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
    ["{wanda-sp: {remove: 30%}}", "{flap: {remove: 30%, bias: false}}", "{block-influence: {remove: 25%}}"],
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
    for stage in ("llm-pruner", "policy_gradient", "layer-perplexity"):
        done = fit(recipe, "--set", f"stages=[{{{stage}: {{remove: 20%}}}}]")
        assert done.returncode == 2 and "sees images" in " ".join(done.stderr.split())
