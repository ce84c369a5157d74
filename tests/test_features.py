"""Features of vision models beside the dense model's, and what their neighbours know."""

import json
import math

import pytest
import torch
import transformers
from test_images import TINY, digits  # noqa: F401 (a fixture)
from test_run import fit
from torch.nn.functional import cosine_similarity

import sparsekit
from sparsekit.cli import main
from sparsekit.measure import check_evaluation
from sparsekit.measure.features import Features, by_neighbours, features_of
from sparsekit.measure.images import labelled_images
from sparsekit.model import features, load_plain, patches

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 8, "patch_size": 2, "num_channels": 1}


def test_neighbours_by_brute_force():
    random = torch.Generator().manual_seed(0)
    asked, gallery = (torch.randn(count, 5, generator=random) for count in (7, 30))
    labels = torch.randint(0, 4, (30,), generator=random)
    said = by_neighbours(asked, gallery, labels, 6)
    for feature, given in zip(asked, said, strict=True):
        near = sorted(range(30), key=lambda index: -float(cosine_similarity(feature, gallery[index], dim=0)))[:6]
        votes = [0.0] * 4
        for index in near:
            votes[labels[index]] += math.exp(float(cosine_similarity(feature, gallery[index], dim=0)) / 0.07)
        assert int(given) == max(range(4), key=votes.__getitem__)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip"])
def test_features_are_the_librarys(digits, kind):  # noqa: F811
    _, processor = load_plain(TINY)
    found = labelled_images(str(digits))
    torch.manual_seed(0)
    if kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).eval()
    else:
        given = {"vision_config": SMALL, "text_config": SMALL | {"num_channels": 3}}
        family = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
        model = family(family.config_class(**given)).eval()
    pixels = found.pixels([0, 3, 5], processor, 1)
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            image = model.get_image_features(pixel_values=pixels)
            image = getattr(image, "pooler_output", image)
        elif kind == "vit":
            image = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            image = model(pixel_values=pixels).pooler_output
    whole, places = features_of(model, processor, found, [0, 3, 5], 2)
    assert torch.allclose(whole, image, atol=1e-5) and places.shape[0] == 3 and places.dim() == 3


def test_a_run_and_eval_compare_with_the_dense_model(tmp_path, digits, capsys):  # noqa: F811
    recipe = tmp_path / "vit.yaml"
    recipe.write_text(
        f'model: {TINY}\npattern: "70%"\nstages: [magnitude]\noutput: {tmp_path / "run"}\n'
        f"calibration: {{source: images, path: {digits}, samples: 8}}\n"
        f"evaluate: {{features: [{{path: {digits}, name: digits, limit: 64, neighbours: 20}}], batch: 64}}\n"
    )
    done = fit(recipe)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    dense, pruned = (report["evaluation"][which]["figures"] for which in ("dense", "pruned"))
    for name in ("digits cosine", "digits cosine of places"):
        assert dense[name]["value"] == pytest.approx(1, abs=1e-6) and 0.1 < pruned[name]["value"] < 0.99
    assert (
        dense["digits neighbours"]["value"] > 0.9
        and dense["digits neighbours"]["value"] > pruned["digits neighbours"]["value"]
    )
    own = [sparsekit.load(str(folder)) for folder in (TINY, tmp_path / "run")]
    found = sparsekit.evaluate(
        *own[1], dense=own[0][0], features=[{"path": str(digits), "name": "digits", "limit": 64}]
    )
    assert found["digits cosine"].value == pytest.approx(pruned["digits cosine"]["value"], abs=1e-4)
    assert main(["eval", str(tmp_path / "run"), "--features", str(digits)]) == 0
    assert "1.000" in capsys.readouterr().out
    assert main(["eval", str(TINY), "--features", str(digits)]) == 2
    assert "name it by --against" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which that is was not said"):
        sparsekit.evaluate(*own[1], features=[str(digits)])


def test_maps_are_averaged(digits):  # noqa: F811
    config = transformers.SegformerConfig(
        num_channels=1, hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1]
    )
    model = transformers.SegformerForImageClassification(config).eval()
    pixels = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, places = features(model, pixels)
        last = model.segformer(pixels).last_hidden_state
    assert torch.allclose(whole, last.mean((2, 3)), atol=1e-6) and places.shape == (2, 4, 16)
    assert patches(model) == 56 * 56  # 224 pixels, the first stage's stride of 4


def test_neighbours_are_looked_for_in_another_part(digits):  # noqa: F811
    for entry, said in (
        ({"path": str(digits / "train"), "neighbours": 5}, "has one part"),
        ({"path": str(digits), "neighbours": 5, "part": "test"}, "has one part"),
        ({"path": str(digits), "neighbors": 5}, "unknown key `neighbors`, did you mean `neighbours`"),
    ):
        with pytest.raises(ValueError, match=said):
            Features(entry, dense=lambda: None)


def test_one_folder_may_be_measured_in_several_ways(digits):  # noqa: F811
    check_evaluation({"accuracy": [str(digits)], "features": [str(digits)], "iou": [str(digits)]})
    with pytest.raises(ValueError, match=r"evaluate\.features: two sets of images are called"):
        check_evaluation({"features": [str(digits), str(digits)]})
