"""Vision metrics that are no classification: classes of pixels, and what a linear classifier reads out of features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_images import TINY, digits  # noqa: F401 (a fixture)

from sparsekit.measure import Subject
from sparsekit.measure.linear_probe import fitted, linear_probe
from sparsekit.measure.mean_iou import mean_iou
from sparsekit.measure.metrics import Preparation
from sparsekit.model import load_plain
from tests.matrix.towers import PROCESSOR, save

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segformer")
    save("segments", "segformer", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return load_plain(folder)


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Four pictures, and classes of their pixels, some of which do not count."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for index in range(4):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
        classes = random.integers(0, 2, (40, 48), dtype=np.uint8)
        classes[:3] = 255
        Image.fromarray(classes).save(tmp_path / "labels" / f"{index}.png")
    return tmp_path


def by_loops(model, processor, folder: Path, indices: range) -> float:
    """Intersection and union pixel by pixel, class by class."""
    agreed, either = {}, {}
    for index in indices:
        pixels = processor(Image.open(folder / "images" / f"{index}.png").convert("RGB"), return_tensors="pt")
        truth = np.array(Image.open(folder / "labels" / f"{index}.png"))
        with torch.no_grad():
            logits = model(pixel_values=pixels["pixel_values"]).logits
        said = torch.nn.functional.interpolate(logits, size=truth.shape, mode="bilinear")[0].argmax(0).numpy()
        for own, right in zip(said.flat, truth.flat, strict=True):
            if right == 255:
                continue
            for each in {int(own), int(right)}:
                either[each] = either.get(each, 0) + 1
            if own == right:
                agreed[int(own)] = agreed.get(int(own), 0) + 1
    return sum(agreed.get(each, 0) / either[each] for each in either) / len(either)


def test_mean_iou_by_loops(segformer, pairs):
    model, processor = segformer
    [figure] = mean_iou(Preparation(processor, model.config), path=str(pairs))(Subject(model, processor)).values()
    assert figure.value == pytest.approx(by_loops(model, processor, pairs, range(4)))
    left = [by_loops(model, processor, pairs, [k for k in range(4) if k != gone]) for gone in range(4)]
    error = (3 / 4 * sum((each - sum(left) / 4) ** 2 for each in left)) ** 0.5
    assert figure.stderr == pytest.approx(error, rel=1e-6) and figure.count == 4


def test_a_label_that_the_model_has_not(segformer, pairs):
    model, processor = segformer
    Image.fromarray(np.full((40, 48), 200, dtype=np.uint8)).save(pairs / "labels" / "2.png")
    with pytest.raises(ValueError, match="has class 200, and the model"):
        mean_iou(Preparation(processor, model.config), path=str(pairs))(Subject(model, processor))
    (pairs / "labels" / "3.png").unlink()
    with pytest.raises(ValueError, match="is not there: each image"):
        mean_iou(Preparation(processor, model.config), path=str(pairs))
    with pytest.raises(ValueError, match="has no images/"):
        mean_iou(Preparation(processor, model.config), path=str(pairs / "labels"))


def test_the_classifier_is_that_of_scikit_learn():
    """The same weights as multinomial logistic regression by another library; the bias is not decayed."""
    linear = pytest.importorskip("sklearn.linear_model")
    random = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 5, generator=random), torch.randint(0, 3, (90,), generator=random)
    features += labels[:, None] * 0.5
    own = fitted(features, labels, 3, decay=0.01)
    other = linear.LogisticRegression(C=1 / (0.01 * 90), tol=1e-10, max_iter=10_000).fit(features, labels)
    torch.testing.assert_close(own[:-1].t(), torch.tensor(other.coef_).float(), rtol=1e-3, atol=1e-3)


def test_a_linear_probe_reads_digits(digits):  # noqa: F811
    """Features of a trained model tell its classes, those of noise far less."""
    model, processor = load_plain(TINY)
    measure = linear_probe(Preparation(processor, model.config), path=str(digits), limit=300)
    [trained] = measure(Subject(model, processor, 64)).values()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.5)
    [noise] = measure(Subject(model, processor, 64)).values()
    assert trained.value > 0.9 and noise.value < trained.value - 0.1 and trained.count == 300


def test_a_set_of_one_part(pairs):
    with pytest.raises(ValueError, match="has one part"):
        linear_probe(Preparation(None, None), path=str(pairs))
