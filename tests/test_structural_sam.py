"""Heads of a fused qkv and MLP channels out of SAM's image encoder: the rest makes the masks that zeros would make."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import sparsekit
from sparsekit.cli import main
from sparsekit.model import discover, load_plain
from sparsekit.model.structure import Shape, find_units
from sparsekit.run.allocation import sample_input

MODELS = Path(__file__).parent / "models"
TINY = MODELS / "tiny-sam"
sys.path.insert(0, str(MODELS))
pytest.importorskip("PIL.Image")
pytest.importorskip("pycocotools.mask")
from drawings import write_drawings  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("drawings")
    write_drawings(found, range(900_000, 900_024))
    return found


def recipe(drawn: Path, output: Path, *stages: dict) -> dict:
    return {
        "model": str(TINY),
        "stages": list(stages),
        "calibration": {"source": "images", "path": str(drawn / "images"), "samples": 16},
        "evaluate": {"iou": [{"path": str(drawn), "name": "drawings", "limit": 6}], "samples": False},
        "output": str(output),
    }


def masked(shape: Shape) -> torch.nn.Module:
    """The dense model without the heads and channels that are gone, by zeros in what reads them."""
    model, _ = load_plain(TINY)
    with torch.no_grad():
        for layer, block in zip(shape.layers, model.vision_encoder.layers, strict=True):
            size = block.attn.proj.weight.shape[1] // layer.heads.of
            for head in set(range(layer.heads.of)) - set(layer.heads.units):
                block.attn.proj.weight[:, head * size : (head + 1) * size] = 0
            gone = sorted(set(range(layer.channels.of)) - set(layer.channels.units))
            block.mlp.lin2.weight[:, gone] = 0
    return model


def test_units_of_a_fused_qkv():
    """Rows of q, k and v of a head lie a third apart; parameters are counted by what goes."""
    model, _ = load_plain(TINY)
    blocks = discover(model, sample_input(model))
    first = find_units(model, blocks).parts[0]
    [rows] = first.inputs.values()
    assert first.count == 4 and rows.shape == (4, 3 * 18)
    assert rows[1].tolist() == [*range(18, 36), *range(90, 108), *range(162, 180)]
    assert first.parameters == 54 * (72 + 1) + 72 * 18


@pytest.mark.parametrize(
    "stage",
    [
        {"wanda-sp": {"remove": "30%"}},
        pytest.param({"flap": {"remove": "30%", "bias": False}}, marks=pytest.mark.long),
        pytest.param({"llm-pruner": {"remove": "20%"}}, marks=pytest.mark.long),
        {"policy_gradient": {"remove": "25%", "steps": 3, "compensate": False}},
    ],
)
def test_what_is_left_computes_the_same(drawn, tmp_path, stage):
    result = sparsekit.fit(recipe(drawn, tmp_path / "run", stage), quiet=True)
    assert result.verified and main(["verify", str(tmp_path / "run")]) == 0
    shape = Shape.read(tmp_path / "run" / "model")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = result.model.get_image_embeddings(pixels)
        torch.testing.assert_close(own, masked(shape).get_image_embeddings(pixels), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in result.model.parameters()) == result.report["structure"]["parameters"]["pruned"]
    assert 0 < result.report["evaluation"]["pruned"]["figures"]["drawings IoU"]["value"] <= 1


def test_equal_channels_are_opened_by_plain_transformers(drawn, tmp_path):
    """The config of the image encoder says how wide its MLPs are."""
    stage = {"wanda-sp": {"remove": "20%", "units": "channels"}}
    result = sparsekit.fit(recipe(drawn, tmp_path / "run", stage), quiet=True)
    assert result.verified
    model = transformers.SamModel.from_pretrained(tmp_path / "run" / "model")
    width = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vision_config"]["mlp_dim"]
    assert width < 288 and model.vision_encoder.layers[5].mlp.lin1.weight.shape == (width, 72)


@pytest.mark.long
def test_a_cut_model_is_pruned_and_recovered(drawn, tmp_path):
    """Structures, then weights, then the features of the dense model as what is learned."""
    stages = [{"wanda-sp": {"remove": "20%"}}, "sparsegpt", {"finetune": {"steps": 2, "batch": 2}}]
    given = recipe(drawn, tmp_path / "run", *stages) | {"pattern": "50%"}
    result = sparsekit.fit(given, quiet=True)
    assert result.verified and result.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.01)


def test_layers_that_see_the_whole_image_are_numbered_anew(drawn, tmp_path):
    """Which layers do is in the config by number; plain transformers opens what is left."""
    result = sparsekit.fit(recipe(drawn, tmp_path / "run", {"block-influence": {"remove": "30%"}}), quiet=True)
    assert result.verified
    model = transformers.SamModel.from_pretrained(tmp_path / "run" / "model")
    left = [layer.index for layer in Shape.read(tmp_path / "run" / "model").layers]
    assert len(model.vision_encoder.layers) == len(left) < 6
    assert model.config.vision_config.global_attn_indexes == [left.index(n) for n in (2, 5) if n in left]
    dense, _ = load_plain(TINY)
    dense.vision_encoder.layers = torch.nn.ModuleList(dense.vision_encoder.layers[index] for index in left)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_embeddings(pixels), dense.get_image_embeddings(pixels))
