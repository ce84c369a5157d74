"""How well a model names the class of each pixel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sparsekit.contracts import Count, Figure, Measure, Preparation
from sparsekit.data import spread

if TYPE_CHECKING:
    from sparsekit.contracts import Subject

NO_CLASS = 255  # of a pixel that does not count


def mean_iou(preparation: Preparation, *, path: str, limit: Count | None = None) -> Measure:
    """Mean intersection over union of semantic segmentation (SegFormer ...): over classes, of all images together.

    path: a folder with `images/NAME.jpg` and `labels/NAME.png`, whose values are classes and 255 what does not count;
    of processors with `do_reduce_labels` (ADE20K) 0 does not count and 1 is the first class. limit: so many images,
    evenly from all. Answers are enlarged to the size of the labels. The standard error is the jackknife's over images.

    Source: Everingham et al. 2015, The Pascal Visual Object Classes Challenge: A Retrospective, section 4.2.
    """
    pairs = _pairs(Path(path))
    pairs = [pairs[index] for index in spread(pairs, limit or preparation.limit)]
    count = len(pairs)

    def measure(subject: Subject) -> dict[str, Figure]:
        model, processor = subject.model, subject.tokenizer
        both = torch.stack([_overlaps(model, processor, *pair) for pair in pairs])  # (images, 2, classes)
        value = _mean(both.sum(0))
        without = torch.tensor([_mean(both.sum(0) - each) for each in both], dtype=torch.float64)
        error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum())) if count > 1 else None
        settings = {"path": path, "images": count}
        return {f"{Path(path).name} mean IoU": Figure(value, error, count, "images", "higher", settings, "mean IoU")}

    return measure


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    pictures = sorted((folder / "images").glob("*")) if (folder / "images").is_dir() else []
    pairs = [(picture, folder / "labels" / f"{picture.stem}.png") for picture in pictures]
    if not pairs:
        raise ValueError(f"{folder} has no images/: give a folder with images/NAME.jpg and labels/NAME.png")
    if absent := [label for _, label in pairs if not label.is_file()]:
        raise ValueError(f"{absent[0]} is not there: each image in images/ has its classes in labels/, as a PNG")
    return pairs


@torch.no_grad()
def _overlaps(model: Any, processor: Any, picture: Path, label: Path) -> Tensor:
    """Pixels where answer and truth agree, and where one of them is, by class: (2, classes), float64."""
    import numpy as np
    from PIL import Image

    pixels = processor(images=[Image.open(picture).convert("RGB")], return_tensors="pt")["pixel_values"]
    truth = torch.from_numpy(np.array(Image.open(label), dtype=np.int64))
    if getattr(processor, "do_reduce_labels", False):
        truth = torch.where(truth == 0, NO_CLASS, truth - 1)
    logits = getattr(model(pixel_values=pixels.to(model.device, model.dtype)), "logits", None)
    if logits is None or logits.dim() != 4:
        raise ValueError(f"{type(model).__name__} names no classes of pixels, so mean-iou has nothing to measure")
    classes = logits.shape[1]
    said = interpolate(logits.float().cpu(), size=tuple(truth.shape), mode="bilinear", align_corners=False)[0].argmax(0)
    counts = truth != NO_CLASS
    if bool(counts.any()) and not 0 <= int(truth[counts].min()) <= int(truth[counts].max()) < classes:
        raise ValueError(f"{label} has class {int(truth[counts].max())}, and the model {classes} classes, from 0")
    said, truth = said[counts], truth[counts]
    agreed = torch.bincount(truth[said == truth], minlength=classes)
    either = torch.bincount(truth, minlength=classes) + torch.bincount(said, minlength=classes) - agreed
    return torch.stack([agreed, either]).double()


def _mean(both: Tensor) -> float:
    """Over the classes that are there, in the truth or in an answer."""
    agreed, either = both
    return float((agreed[either > 0] / either[either > 0]).mean()) if bool((either > 0).any()) else 0.0
