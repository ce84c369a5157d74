"""How often an image classifier is right."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekit import registry
from sparsekit.data import Images, images, spread
from sparsekit.model import channels_of

OPTIONS = ("part", "image", "label")  # of the source, in an entry of `evaluate.accuracy`
KEYS = ("path", *OPTIONS, "name", "limit")


def full_entry(entry: str | Mapping[str, Any], keys: Sequence[str], what: str) -> Mapping[str, Any]:
    """An entry that names images, in full. Raises ValueError for a key that it cannot have."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    for key in entry:
        if key not in keys:
            raise ValueError(f"{what} of {image_set_name(entry)}: unknown key `{key}`, {registry.suggest(key, keys)}")
    return entry


def image_set_name(entry: str | Mapping[str, Any]) -> str:
    """The name that a set of images has in the results: its own, or that of its folder."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    return str(entry.get("name") or Path(entry["path"]).name)


def image_limit(entry: str | Mapping[str, Any]) -> int | None:
    """How many of an entry's images are looked at, if it says so itself."""
    return None if isinstance(entry, str) else entry.get("limit")


def labelled_images(entry: str | Mapping[str, Any]) -> Images:
    """The images of an entry of `evaluate.accuracy`: a path, or {path, part, image, label, name, limit}."""
    entry = full_entry(entry, KEYS, "accuracy")
    given = {key: entry[key] for key in OPTIONS if entry.get(key) is not None}
    return images("test", path=entry["path"], **given)


@torch.no_grad()
def accuracy(
    model: Any, processor: Any, found: Images, *, batch: int = 1, limit: int | None = None
) -> dict[str, float]:
    """{"acc": share of images whose likeliest class is the right one, "acc_stderr", "images": how many}.

    limit: so many images, spread evenly over all of them. Raises ValueError as `Images.classes` does.
    """
    from torchmetrics.classification import MulticlassAccuracy

    classes = found.classes(model)
    chosen = spread(found, limit)
    count = len(chosen)
    right = MulticlassAccuracy(model.config.num_labels, average="micro", sync_on_compute=False).to(model.device)
    labels = list(found.rows[found.label])
    if strange := {label for label in labels if label is None or not 0 <= label < len(classes)}:
        raise ValueError(f"{found.name} has images with the label {strange.pop()}, which is no class: leave them out")
    channels = channels_of(model.config)
    for start in range(0, count, batch):
        part = chosen[start : start + batch]
        pixels = found.pixels(part, processor, channels).to(model.device, model.dtype)
        answer = model(pixel_values=pixels).logits.float()
        right.update(answer, torch.tensor([classes[labels[index]] for index in part], device=model.device))
    share = float(right.compute())
    return {"acc": share, "acc_stderr": math.sqrt(share * (1 - share) / max(1, count - 1)), "images": count}
