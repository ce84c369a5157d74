"""Recovery of vision models: images instead of text, and the dense model's features instead of labels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.contracts import Context
from sparsekit.data import calibration_images
from sparsekit.model import channels_of, chosen_tower, features
from sparsekit.train.rows import Rows


def picture_rows(context: Context, settings: Mapping[str, Any], validation: float) -> tuple[Rows, Rows]:
    """Images to learn from, and others to choose the best state by, as rows whose `ids` are pixels.

    settings: a source of images with `samples`; none: the recipe's calibration images
    validation: the share of them that is held out

    Raises:
        ValueError: fewer than two images, or a source that gives none.
    """
    pixels = context.tokens
    if settings:
        given = {"samples": len(pixels), "seed": context.seed} | dict(settings)
        channels = channels_of(chosen_tower(context.model).config)
        pixels = calibration_images(given, context.tokenizer(), channels)
    held_out = max(1, round(validation * len(pixels)))
    if len(pixels) <= held_out:
        raise ValueError(f"{len(pixels)} images cannot be learned from with {held_out} held out: give more `samples`")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(context.seed))
    parts = (pixels[order[held_out:]].float(), pixels[order[:held_out]].float())
    training, chosen = (Rows(part, torch.zeros(len(part), 1, dtype=torch.long)) for part in parts)
    return training, chosen


def feature_distance(own: Tensor, dense: Tensor) -> Tensor:
    """Squared differences of features (..., width) over the dense ones' energy, float32: one number a place."""
    own, dense = own.float(), dense.float()
    return (own - dense).square().sum(-1) / dense.square().sum(-1).clamp_min(1e-12)


class FeatureObjective:
    """How far the features of all places are from the dense model's: squared differences over the dense energy.

    The distance that SlimSAM (arXiv:2312.05284) and MobileSAM (arXiv:2306.14289) distill by, of each place in units of
    its own energy. load: makes the dense model; called at the first batch
    """

    def __init__(self, load: Callable[[], nn.Module]):
        self.load = load
        self.dense: nn.Module | None = None

    def __call__(self, model: nn.Module, pixels: Tensor, *_: Tensor) -> tuple[Tensor, float, int]:
        """The loss of a batch of images, a sum over their places; the same as a number; how many places there are."""
        if self.dense is None:
            self.dense = self.load().to(pixels.device).eval()
        own = features(model, pixels)[1]
        with torch.no_grad():
            other = features(self.dense, pixels)[1]
        apart = feature_distance(own, other)
        return apart.sum(), float(apart.detach().sum()), apart.numel()

    def validation(self, model: nn.Module, rows: Rows) -> tuple[Tensor, int]:
        """The loss of rows, a sum, and how many places it is over."""
        loss, _, count = self(model, rows.ids)
        return loss, count

    def forget(self) -> None:
        """Give the dense model's memory back."""
        self.dense = None
