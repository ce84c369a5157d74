"""Images in, pixels out: where calibration and test images come from."""

import math
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.contracts import Count
from sparsekit.data.corpora import no_bars, part_of
from sparsekit.data.naming import drawn, resolve

SQUARE = 448  # pixels: 16 patches of 28, or 14 of 32
PLACES = {"image_grid_thw", "image_position_ids", "spatial_shapes"}  # what processors say of where patches lie


@dataclass(frozen=True)
class Images:
    """Images, and what is on them where that is known.

    rows: of `datasets`, decoded as they are asked for. image, label: the columns; label may be missing
    name: what an error calls it
    side: pixels along the sides of the square that pictures become for a model that takes patches of any number
    """

    rows: Any
    image: str
    label: str
    name: str
    side: int = SQUARE

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, chosen: Sequence[int], processor: Any, channels: int) -> Tensor:
        """Some of the images as the model sees them, float32: (images, channels, height, width).

        Of a model that takes patches of images of any size (Qwen-VL, Gemma 4): (images, patches, values) of squares.
        Raises ValueError where the processor makes something else of a square.
        """
        pictures = [self.rows[index][self.image].convert("L" if channels == 1 else "RGB") for index in chosen]
        made = processor(images=pictures[:1], return_tensors="pt")
        if not PLACES & made.keys():
            found: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
            return found
        squares = [picture.resize((self.side, self.side)) for picture in pictures]
        return torch.stack([_patches(processor(images=[each], return_tensors="pt"), self.name) for each in squares])

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


def _patches(made: Mapping[str, Tensor], name: str) -> Tensor:
    """The patches (patches, values) of one square picture, of what a processor made of it; padding is left out."""
    values = made["pixel_values"]
    if "image_position_ids" in made:
        values = values[0][(made["image_position_ids"][0] >= 0).all(-1)]
    elif "pixel_attention_mask" in made:
        values = values[0][made["pixel_attention_mask"][0].bool()]
    values = values.flatten(1)
    sides = [made[key].flatten().tolist() for key in ("image_grid_thw", "spatial_shapes") if key in made]
    if math.isqrt(len(values)) ** 2 != len(values) or any(len(each) > 3 or each[-1] != each[-2] for each in sides):
        raise ValueError(
            f"the model's image processor makes {len(values)} patches of a square picture of {name}, which are no "
            "square of patches: give another `side`, a multiple of its patches' size and of how many it merges"
        )
    return values


def images(
    split: str,
    *,
    path: str,
    part: str | None = None,
    image: str = "image",
    label: str = "label",
    side: Count = SQUARE,
) -> Images:
    """Images for vision models: a folder (with a folder for each class, or metadata as `datasets` reads it), a Parquet
    file, or a data set on the hub.

    part: of the data set; null: train for calibration, test or else validation for testing, or the only one
    image, label: names of the columns
    side: for models that take patches of images of any size, pixels along the sides of the square that pictures become
    """
    parts = parts_of_set(path)
    rows = parts[part_of(path, list(parts), part, split)]
    if type(rows.features.get(image)).__name__ != "Image":
        valid = [name for name, kind in rows.features.items() if type(kind).__name__ == "Image"]
        raise ValueError(f"{path} has no images called `{image}`: set `image` to one of {', '.join(valid) or 'none'}")
    return Images(rows, image, label, Path(path).name, side)


def pillow() -> Any:
    """Pillow's module of images. Raises ValueError where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "images are read by pillow, which is not installed: pip install 'sparsekit-lightning[vision]'"
        ) from None
    return Image


def spread(images: Sized, limit: int | None) -> list[int]:
    """The numbers of so many images, spread evenly over all of them; limit: null: all."""
    count = min(limit or len(images), len(images))
    return [index * len(images) // count for index in range(count)]


def parts_of_set(path: str) -> Mapping[str, Any]:
    """The parts of a data set of images, by name: of a folder, a Parquet file, or one on the hub.

    Raises ValueError where there is none, or pillow is missing.
    """
    import datasets

    pillow()
    try:
        with no_bars():
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


def calibration_pictures(
    settings: Mapping[str, Any], processor: Any, channels: int
) -> tuple[Tensor, Images, list[int]]:
    """Calibration images as `Images.pixels` gives them, float32, `samples` different ones, drawn by `seed`; which ones.

    settings: {source: images, samples, seed, the source's own options}; a `length` is passed over.
    Raises ValueError if the source gives text, or too few images.
    """
    function, options = resolve(settings)
    found = function("calibration", **options)
    if not isinstance(found, Images):
        raise ValueError(
            f"the model sees images, and the source `{settings['source']}` gives text: give images, as in "
            "calibration: {source: images, path: FOLDER}"
        )
    chosen = drawn(len(found), settings, found.name, "images")
    return found.pixels(chosen, processor, channels), found, chosen


def calibration_images(settings: Mapping[str, Any], processor: Any, channels: int) -> Tensor:
    """The pixels of `calibration_pictures`."""
    return calibration_pictures(settings, processor, channels)[0]
