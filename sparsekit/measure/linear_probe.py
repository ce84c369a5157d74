"""What a linear classifier can read out of a model's features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from sparsekit.contracts import Count, Figure, Measure, NotNegative, Preparation
from sparsekit.data import images, spread
from sparsekit.measure.features import features_of

if TYPE_CHECKING:
    from sparsekit.contracts import Subject


def linear_probe(
    preparation: Preparation, *, path: str, limit: Count | None = None, decay: NotNegative = 1e-3
) -> Measure:
    """Accuracy on labelled images of a linear classifier on a vision model's features, which stay as they are.

    path: a folder with train/CLASS/ and test/CLASS/, or a data set with both parts. limit: so many images of each part,
    evenly from all. decay: of the classifier's weights, in the mean loss. Features are of whole images, standardised by
    the training part; the classifier is multinomial logistic regression, by L-BFGS from zero.

    Source: DINOv2, Oquab et al. 2023, arXiv 2304.07193, section 7.1 (linear classification, one setting of them).
    """
    parts = {split: images(split, path=path) for split in ("calibration", "test")}
    if parts["calibration"].rows.split == parts["test"].rows.split:
        raise ValueError(
            f"{path} has one part, and a classifier is trained on another: give train/CLASS/ and test/CLASS/"
        )
    for found in parts.values():
        if found.label not in found.rows.features:
            raise ValueError(f"{path} has no labels: give train/CLASS/ and test/CLASS/")
    chosen = {split: spread(found, limit or preparation.limit) for split, found in parts.items()}
    labels = {s: torch.tensor(list(found.rows[found.label]))[chosen[s]] for s, found in parts.items()}

    def measure(subject: Subject) -> dict[str, Figure]:
        seen = {
            s: features_of(subject.model, subject.tokenizer, found, chosen[s], subject.batch)[0]
            for s, found in parts.items()
        }
        center, scale = seen["calibration"].mean(0), seen["calibration"].std(0).clamp_min(1e-6)
        train, test = ((each - center) / scale for each in (seen["calibration"], seen["test"]))
        weight = fitted(train, labels["calibration"], int(max(each.max() for each in labels.values())) + 1, decay)
        right = (_with_one(test) @ weight).argmax(1) == labels["test"]
        error = float(right.double().std()) / math.sqrt(len(right)) if len(right) > 1 else None
        settings = {"path": path, "images": len(right), "trained on": len(train), "decay": decay}
        name = f"{parts['test'].name} linear probe"
        return {
            name: Figure(float(right.double().mean()), error, len(right), "images", "higher", settings, "linear probe")
        }

    return measure


def fitted(features: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """The weights (width + 1, classes) of multinomial logistic regression, the last row the bias; float64."""
    given, target = _with_one(features).double(), one_hot(labels, classes).double()
    weight = torch.zeros(given.shape[1], classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(given @ weight, target) + decay * weight[:-1].square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach().to(features)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)
