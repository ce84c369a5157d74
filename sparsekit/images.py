"""Images in, pixels out: where calibration and test images come from, and how often a classifier is right."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit import data, plugins

PARTS = {"calibration": ("train",), "test": ("test", "validation")}  # of a data set, the first that is there
OPTIONS = ("part", "image", "label")  # of the source, in an entry of `evaluate.accuracy`
KEYS = ("path", *OPTIONS, "name", "limit")


@dataclass(frozen=True)
class Images:
    """Images, and what is on them where that is known.

    rows: of `datasets`, decoded as they are asked for. image, label: the columns; label may be missing
    name: what an error calls it
    """

    rows: Any
    image: str
    label: str
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, chosen: Sequence[int], processor: Any, channels: int) -> Tensor:
        """Some of the images as the model sees them (images, channels, height, width), float32."""
        pictures = [self.rows[index][self.image].convert("L" if channels == 1 else "RGB") for index in chosen]
        found: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return found

    def classes(self, model: Any) -> list[int]:
        """A classifier's number for each of the labels here: by name, or by order where it has other names.

        Raises:
            ValueError: the model is no classifier, there are no labels, or other ones than it has.
        """
        if "ForImageClassification" not in type(model).__name__:
            raise ValueError(f"{type(model).__name__} tells no classes, so no accuracy can be measured; leave it out")
        config = model.config
        kind = self.rows.features.get(self.label)
        names = getattr(kind, "names", None)
        if names is None and "int" in str(getattr(kind, "dtype", "")):
            return list(range(config.num_labels))
        if names is None:
            raise ValueError(
                f"{self.name} has no labels called `{self.label}` to compare with; give a folder with a folder for "
                "each class, or name the column by `label`"
            )
        known = {str(name): int(number) for name, number in config.label2id.items()}
        if all(name in known for name in names):
            return [known[name] for name in names]
        if len(names) != len(known):
            raise ValueError(
                f"{self.name} has {len(names)} classes, the model {len(known)}, and not all of their names are the "
                f"model's (such as {names[0]!r}); give images of the classes that it was trained on"
            )
        warnings.warn(
            f"the classes of {self.name} have other names than the model's ({names[0]!r}, {config.id2label[0]!r}), so "
            "they were taken in order",
            stacklevel=2,
        )
        return list(range(len(names)))


def images(split: str, *, path: str, part: str | None = None, image: str = "image", label: str = "label") -> Images:
    """Images for vision models: a folder (with a folder for each class, or metadata as `datasets` reads it), a Parquet
    file, or a data set on the hub.

    part: of the data set; null: train for calibration, test or else validation for testing, or the only one
    image, label: names of the columns
    """
    parts = _parts(path)
    if part is not None and part not in parts:
        raise ValueError(f"{path} has no part `{part}`, {plugins.suggest(part, list(parts))}")
    known = [each for each in (part, *PARTS[split]) if each is not None and each in parts] or list(parts)
    if part is None and known[0] not in PARTS[split] and len(parts) > 1:
        raise ValueError(f"{path} has the parts {', '.join(parts)}; say which by `part`")
    rows = parts[known[0]]
    if type(rows.features.get(image)).__name__ != "Image":
        valid = [name for name, kind in rows.features.items() if type(kind).__name__ == "Image"]
        raise ValueError(f"{path} has no images called `{image}`: set `image` to one of {', '.join(valid) or 'none'}")
    return Images(rows, image, label, Path(path).name)


def _parts(path: str) -> Mapping[str, Any]:
    import datasets

    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ValueError("images are read by pillow, which is not installed: pip install 'sparsekit[vision]'") from None
    try:
        with data.no_bars():
            if Path(path).is_dir():
                found = datasets.load_dataset("imagefolder", data_dir=path)
            elif Path(path).suffix == ".parquet":
                found = datasets.load_dataset("parquet", data_files=path)
            else:
                found = datasets.load_dataset(path)
    except Exception as error:  # data sets and the hub are other people's and raise anything
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        raise ValueError(f"`{path}` is no folder, file or hub data set of images ({reason})") from error
    return {name: rows for name, rows in found.items() if len(rows)}


def calibration_images(settings: Mapping[str, Any], processor: Any, channels: int) -> Tensor:
    """Calibration images (samples, channels, height, width), float32: `samples` different ones, drawn by `seed`.

    settings: {source: images, samples, seed, the source's own options}; a `length` is passed over.
    Raises ValueError if the source gives text, or too few images.
    """
    function, options = data.resolve(settings)
    found = function("calibration", **options)
    if not isinstance(found, Images):
        raise ValueError(
            f"the model sees images, and the source `{settings['source']}` gives text: give images, as in "
            "calibration: {source: images, path: FOLDER}"
        )
    count = settings["samples"]
    if len(found) < count:
        raise ValueError(
            f"{found.name} has {len(found)} images, fewer than `samples`, {count}: give more, or ask fewer"
        )
    return found.pixels(random.Random(settings["seed"]).sample(range(len(found)), count), processor, channels)


def named(entry: str | Mapping[str, Any]) -> str:
    """The name that a set of images has in the results: its own, or that of its folder."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    return str(entry.get("name") or Path(entry["path"]).name)


def limit_of(entry: str | Mapping[str, Any]) -> int | None:
    """How many of an entry's images are looked at, if it says so itself."""
    return None if isinstance(entry, str) else entry.get("limit")


def labelled(entry: str | Mapping[str, Any]) -> Images:
    """The images of an entry of `evaluate.accuracy`: a path, or {path, part, image, label, name, limit}."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"accuracy of {named(entry)}: unknown key `{key}`, {plugins.suggest(key, KEYS)}")
    given = {key: entry[key] for key in OPTIONS if entry.get(key) is not None}
    return images("test", path=entry["path"], **given)


@torch.no_grad()
def accuracy(
    model: Any, processor: Any, found: Images, *, batch: int = 1, limit: int | None = None
) -> dict[str, float]:
    """{"acc": share of images whose likeliest class is the right one, "acc_stderr", "n": images}.

    limit: so many images, spread evenly over all of them. Raises ValueError as `Images.classes` does.
    """
    from torchmetrics.classification import MulticlassAccuracy

    classes = found.classes(model)
    count = min(limit or len(found), len(found))
    chosen = [index * len(found) // count for index in range(count)]
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
    return {"acc": share, "acc_stderr": math.sqrt(share * (1 - share) / max(1, count - 1)), "n": count}


def sees_images(model: Any) -> bool:
    """Whether a model is given pixels, and not tokens."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def channels_of(config: Any) -> int:
    """Colours that a vision model sees, by its configuration."""
    return int(getattr(vision(config), "num_channels", 3))


def vision(config: Any) -> Any:
    """The part of a configuration that describes the image encoder."""
    return getattr(config, "vision_config", config)


def side(size: Any) -> tuple[int, int]:
    """Height and width, of a number or a pair in a configuration."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def patches(config: Any) -> int:
    """Patches of an image, by the model's configuration."""
    own = vision(config)
    (height, width), (tall, wide) = side(own.image_size), side(own.patch_size)
    return (height // tall) * (width // wide)
