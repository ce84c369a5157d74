"""Images with a mask for each object on them: what models that cut objects out are measured on."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekit.data.corpora import part_of
from sparsekit.data.pictures import parts_of_set, pillow

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedImages:
    """Images, each with the masks of objects on it.

    name: what an error calls it
    count: images
    read: an image's number -> the picture (of pillow, RGB) and its masks (height, width), one after another
    """

    name: str
    count: int
    read: Callable[[int], tuple[Any, Iterator[Mask]]]

    def __len__(self) -> int:
        return self.count

    def objects(self, index: int, most: int | None = None) -> tuple[Any, list[Mask]]:
        """One picture, and the masks of its objects that can be seen at all, `most` of them.

        Raises ValueError where a mask has another size than its picture.
        """
        picture, masks = self.read(index)
        found: list[Mask] = []
        for mask in masks:
            if mask.shape != (picture.height, picture.width):
                raise ValueError(
                    f"{self.name}: a mask of image {index + 1} is {mask.shape[1]} x {mask.shape[0]} pixels, and the "
                    f"image {picture.width} x {picture.height}: give masks of the images' own size"
                )
            if mask.any():
                found.append(mask)
            if len(found) == most:
                break
        return picture, found


def masked_images(
    path: str, *, images: str | None = None, part: str | None = None, image: str = "image", masks: str = "masks"
) -> MaskedImages:
    """Images with masks: of a folder, a COCO file, a Parquet file or a data set on the hub.

    path: a folder with `images/NAME.jpg` and `masks/NAME.png` (each value but 0 is an object) or `masks/NAME.1.png`,
        `masks/NAME.2.png` ... (one object each); a folder with `NAME.jpg` and `NAME.json` (SA-1B); annotations of COCO
        (.json); a Parquet file or a data set on the hub, with a column of images and one of masks (an image whose
        values are objects, or a list of images)
    images: the folder of the pictures that COCO's annotations speak of
    part, image, masks: of a data set, and its columns

    Raises:
        ValueError: there are no such images, or no masks.
    """
    folder = Path(path)
    if folder.is_dir():
        found = _pairs(folder) if (folder / "masks").is_dir() else _beside(folder)
    elif folder.suffix == ".json":
        found = _coco(folder, images)
    else:
        found = _columns(path, part, image, masks)
    if not len(found):
        raise ValueError(
            f"`{path}` holds no images with masks: give a folder with images/NAME.jpg and masks/NAME.png, one with "
            "NAME.jpg and NAME.json (SA-1B), annotations of COCO, or a data set with a column of masks"
        )
    return found


def _open(file: Path) -> Any:
    return pillow().open(file).convert("RGB")


def _objects(labels: Any) -> Iterator[Mask]:
    """The objects of an image whose values are their numbers; 0 is none."""
    values = np.asarray(labels)
    if values.ndim == 3:  # colours, as many data sets have them: each is an object, black is none
        values = values[..., :3].astype(np.int64) @ np.array([65536, 256, 1])
    for value in np.unique(values):
        if value:
            yield values == value


def _pairs(folder: Path) -> MaskedImages:
    pictures = sorted(file for file in (folder / "images").glob("*") if file.suffix.lower() in PICTURES)
    drawn: dict[str, list[Path]] = {}
    for file in sorted((folder / "masks").glob("*")):
        if file.suffix.lower() in PICTURES:
            stem, _, number = file.stem.rpartition(".")
            drawn.setdefault(stem if stem and number.isdigit() else file.stem, []).append(file)
    pictures = [file for file in pictures if file.stem in drawn]

    def read(index: int) -> tuple[Any, Iterator[Mask]]:
        files = drawn[pictures[index].stem]
        alone = [file for file in files if file.stem != pictures[index].stem]

        def masks() -> Iterator[Mask]:
            for file in files:
                with pillow().open(file) as opened:
                    if file in alone:
                        yield np.asarray(opened.convert("L")) > 0
                    else:
                        yield from _objects(opened.convert("RGB") if opened.mode == "P" else opened)

        return _open(pictures[index]), masks()

    return MaskedImages(folder.name, len(pictures), read)


def _decoder() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise ValueError(
            "COCO's and SA-1B's masks are read by pycocotools, which is not installed: pip install "
            "'sparsekit-lightning[vision]'"
        ) from None
    return mask


def _beside(folder: Path) -> MaskedImages:
    """SA-1B: a JSON file of the same name beside each picture."""
    pictures = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in PICTURES]
    pictures = [file for file in pictures if file.with_suffix(".json").is_file()]

    def read(index: int) -> tuple[Any, Iterator[Mask]]:
        told = json.loads(pictures[index].with_suffix(".json").read_text(encoding="utf-8"))
        decode = _decoder().decode
        return _open(pictures[index]), (decode(each["segmentation"]).astype(bool) for each in told["annotations"])

    return MaskedImages(folder.name, len(pictures), read)


def _coco(file: Path, images: str | None) -> MaskedImages:
    if not file.is_file():
        raise ValueError(f"there is no file `{file}`: give the annotations of COCO, such as instances_val2017.json")
    if images is None or not Path(images).is_dir():
        raise ValueError(f"`{file}` speaks of pictures; give their folder by `images`, it is {images!r}")
    _decoder()
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            known = COCO(str(file))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"`{file}` holds no annotations of COCO ({error})") from error
    numbers = [number for number in sorted(known.imgs) if known.getAnnIds(imgIds=number, iscrowd=False)]

    def read(index: int) -> tuple[Any, Iterator[Mask]]:
        number = numbers[index]
        annotations = known.loadAnns(known.getAnnIds(imgIds=number, iscrowd=False))
        picture = _open(Path(images) / known.imgs[number]["file_name"])
        return picture, (known.annToMask(each).astype(bool) for each in annotations)

    return MaskedImages(file.stem, len(numbers), read)


def _columns(path: str, part: str | None, image: str, masks: str) -> MaskedImages:
    parts = parts_of_set(path)
    rows = parts[part_of(path, list(parts), part, "test")]
    for column in (image, masks):
        if column not in rows.features:
            raise ValueError(
                f"{path} has no column `{column}`: its columns are {', '.join(rows.features)}; name those of images "
                "and masks by `image` and `masks`"
            )

    def read(index: int) -> tuple[Any, Iterator[Mask]]:
        row = rows[index]
        given = row[masks]
        if isinstance(given, list):
            return row[image].convert("RGB"), (np.asarray(each.convert("L")) > 0 for each in given)
        return row[image].convert("RGB"), _objects(given)

    return MaskedImages(Path(path).name, len(rows), read)
