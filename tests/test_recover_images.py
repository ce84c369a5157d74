"""Recovery of vision models by the dense model's features."""

import json

import pytest
import torch
import transformers
from test_images import TINY, digits  # noqa: F401 (a fixture)
from test_run import fit

from sparsekit.measure.images import labelled_images
from sparsekit.model import load_plain
from sparsekit.train.features import FeatureObjective


@pytest.fixture
def recipe(tmp_path, digits):  # noqa: F811
    file = tmp_path / "vit.yaml"
    file.write_text(
        f"model: {TINY}\nstages: [magnitude]\noutput: {tmp_path / 'run'}\n"
        f"calibration: {{source: images, path: {digits}, samples: 128, batch: 16}}\n"
        f"evaluate: {{features: [{{path: {digits}, name: digits, limit: 64}}], batch: 64}}\n"
    )
    return file


def test_the_loss_is_the_distance_of_features(digits):  # noqa: F811
    dense, processor = load_plain(TINY)
    pruned, _ = load_plain(TINY)
    with torch.no_grad():
        for block in pruned.vit.layers:
            block.mlp.fc1.weight.mul_(block.mlp.fc1.weight.abs() > 0.05)
        pixels = labelled_images(str(digits)).pixels([0, 1, 2], processor, 1)
        own, other = (model.vit(pixel_values=pixels).last_hidden_state.double() for model in (pruned, dense))
        loss, said, count = FeatureObjective(lambda: dense)(pruned, pixels)
    expected = ((own - other).norm(dim=-1) / other.norm(dim=-1)).square().sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4) == said and count == own.shape[0] * own.shape[1]


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_recovery_brings_features_nearer_and_keeps_zeros(tmp_path, recipe, stage):
    chains = {"before": "magnitude", "after": f"magnitude, {{{stage}: {{steps: 30, batch: 16}}}}"}
    done = [
        fit(recipe, "--set", f"stages=[{chain}]", "pattern=80%", f"output={tmp_path / name}")
        for name, chain in chains.items()
    ]
    assert [each.returncode for each in done] == [0, 0], done[1].stderr
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("before", "after")]
    near = [each["evaluation"]["pruned"]["figures"]["digits cosine of places"]["value"] for each in reports]
    assert near[1] > near[0] + 0.02 and reports[1]["verified"] is True
    opens = transformers.AutoModelForImageClassification
    before, after = (opens.from_pretrained(tmp_path / name / "model") for name in ("before", "after"))
    for name in reports[1]["sparsity"]["per_linear"]:
        zeros = before.get_parameter(f"{name}.weight") == 0
        assert after.get_parameter(f"{name}.weight")[zeros].count_nonzero() == 0
    assert torch.equal(before.classifier.weight, after.classifier.weight)  # the head is not of a block


def test_classes_are_learned(tmp_path, recipe, digits):  # noqa: F811
    """A model that was pruned too far learns the classes again; the loss is cross-entropy, beside features or alone."""
    dense, processor = load_plain(TINY)
    found = labelled_images(str(digits))
    pixels, rows = found.pixels([0, 1, 2], processor, 1), torch.tensor(found.classes(dense))
    classes = rows[torch.tensor([found.rows[index]["label"] for index in range(3)])][:, None]
    with torch.no_grad():
        own = dense(pixel_values=pixels, labels=classes[:, 0]).loss
        alone, _, count = FeatureObjective(lambda: dense, 1.0)(dense, pixels, classes)
        both, _, places = FeatureObjective(lambda: dense, 0.5)(dense, pixels, classes)
    assert (
        float(alone) / count == pytest.approx(float(own), rel=1e-5) == pytest.approx(2 * float(both) / places, rel=1e-4)
    )
    done = fit(
        recipe,
        "--set",
        "stages=[magnitude, {finetune: {steps: 60, batch: 16, labels: 1.0, learning_rate: 0.001}}]",
        "pattern=80%",
        f"evaluate={{accuracy: [{{path: {digits}, name: digits}}], batch: 64}}",
    )
    assert done.returncode == 0, done.stderr
    tasks = json.loads((tmp_path / "run" / "report.json").read_text())["evaluation"]["pruned"]["tasks"]
    assert tasks["digits"]["acc"] > 0.7


def test_a_cut_model_is_recovered(tmp_path, recipe):
    done = fit(recipe, "--set", "stages=[{wanda-sp: {remove: 30%}}, {finetune: {steps: 20, batch: 16}}]")
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "run" / "report.json").read_text())["notes"]["finetune"]
    losses = [validated for *_, validated in note["curve"] if validated is not None]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("distill: 0.5", "`finetune`, reads text alone with distill, and ViTForImageClassification sees images"),
        ("length: 64", "reads text alone with length"),
        ("labels: 0.5, distill: 0.5", "labels are of images, and distill of text"),
        ("hidden: 0.1, cache: 0", "reads text alone with hidden, cache"),
        ("steps: 2, source: {source: python-docs}", "gives text"),
        ("tokens: 10", "less than the 64 of one step (4 rows of 16)"),
    ],
)
def test_what_is_of_text_is_refused(tmp_path, recipe, options, said):
    done = fit(recipe, "--set", f"stages=[magnitude, {{finetune: {{{options}}}}}]", "pattern=50%", "evaluate={}")
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    if "reads text alone" in said:  # before anything is pruned
        assert not (tmp_path / "run").exists()
