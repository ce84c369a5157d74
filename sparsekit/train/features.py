"""Recovery of vision models: images instead of text, and the dense model's features instead of labels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekit.contracts import Context
from sparsekit.data import calibration_pictures
from sparsekit.model import channels_of, chosen_tower, features
from sparsekit.train.rows import Rows


def picture_rows(
    context: Context, settings: Mapping[str, Any], validation: float, *, labelled: bool = False
) -> tuple[Rows, Rows]:
    """Images to learn from, and others to choose the best state by, as rows whose `ids` are pixels.

    settings: a source of images with `samples`; none: the recipe's calibration images
    validation: the share of them that is held out. labelled: with each one's class as its label

    Raises:
        ValueError: fewer than two images, a source that gives none, or labels that are not the model's.
    """
    pixels, classes = context.tokens, torch.zeros(len(context.tokens), 1, dtype=torch.long)
    if settings or labelled:
        own = {key: value for key, value in context.calibration.items() if key != "batch"}
        given = {"samples": len(pixels), "seed": context.seed} | (dict(settings) or own)
        channels = channels_of(chosen_tower(context.model).config)
        pixels, found, chosen = calibration_pictures(given, context.tokenizer(), channels)
        if labelled:
            known = torch.tensor(found.classes(context.model))
            classes = known[torch.tensor([found.rows[index][found.label] for index in chosen])][:, None]
        else:
            classes = torch.zeros(len(pixels), 1, dtype=torch.long)
    held_out = max(1, round(validation * len(pixels)))
    if len(pixels) <= held_out:
        raise ValueError(f"{len(pixels)} images cannot be learned from with {held_out} held out: give more `samples`")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(context.seed))
    training, testing = (Rows(pixels[part].float(), classes[part]) for part in (order[held_out:], order[:held_out]))
    return training, testing


def feature_distance(own: Tensor, dense: Tensor) -> Tensor:
    """Squared differences of features (..., width) over the dense ones' energy, float32: one number a place."""
    own, dense = own.float(), dense.float()
    return (own - dense).square().sum(-1) / dense.square().sum(-1).clamp_min(1e-12)


class FeatureObjective:
    """How far the features of all places are from the dense model's: squared differences over the dense energy.

    The distance that SlimSAM (arXiv:2312.05284) and MobileSAM (arXiv:2306.14289) distill by, of each place in units of
    its own energy. load: makes the dense model; called at the first batch
    labels: the share of the loss that is the cross-entropy of the images' classes, as many times as they have places
    """

    def __init__(self, load: Callable[[], nn.Module], labels: float = 0.0):
        self.load, self.labels = load, labels
        self.dense: nn.Module | None = None

    def __call__(
        self, model: nn.Module, pixels: Tensor, classes: Tensor | None = None, *_: Tensor
    ) -> tuple[Tensor, float, int]:
        """The loss of a batch of images, a sum over their places; the same as a number; how many places there are.

        classes: (images, 1), where labels count
        """
        places = 1
        total = torch.zeros((), device=pixels.device)
        if self.labels < 1:
            apart = self._apart(model, pixels)
            places, total = apart.numel() // len(pixels), (1 - self.labels) * apart.sum()
        if self.labels and classes is not None:
            logits = model(pixel_values=pixels).logits.float()
            total = total + self.labels * places * cross_entropy(logits, classes[:, 0], reduction="sum")
        return total, float(total.detach()), places * len(pixels)

    def _apart(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """How far the features of each place are from the dense model's."""
        if self.dense is None:
            self.dense = self.load().to(pixels.device).eval()
        own = features(model, pixels)[1]
        with torch.no_grad():
            other = features(self.dense, pixels)[1]
        return feature_distance(own, other)

    def validation(self, model: nn.Module, rows: Rows) -> tuple[Tensor, int]:
        """The loss of rows, a sum, and how many places it is over."""
        loss, _, count = self(model, rows.ids, rows.labels)
        return loss, count

    def forget(self) -> None:
        """Give the dense model's memory back."""
        self.dense = None
