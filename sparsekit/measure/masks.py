"""How well a model cuts objects out: intersection over union of its masks, asked for by a point or a box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekit import registry
from sparsekit.contracts import Figure
from sparsekit.data import MaskedImages, masked_images, spread
from sparsekit.measure.images import full_entry

if TYPE_CHECKING:
    from sparsekit.measure.metrics import Subject

PROMPTS = ("point", "centroid", "box")
ANSWERS = ("single", "likeliest", "best")
READS = ("path", "images", "part", "image", "masks")  # keys of an entry that belong to the set
KEYS = (*READS, "name", "prompt", "answer", "objects", "limit")
OBJECTS = 16  # that are asked for at once: their masks are scaled up to the picture's size


def mask_set(entry: str | Mapping[str, Any]) -> MaskedImages:
    """The images of an entry of `evaluate.iou`: a path, or a mapping as recipes have it."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    return masked_images(**{key: entry[key] for key in READS if entry.get(key) is not None})


def mask_set_name(entry: str | Mapping[str, Any]) -> str:
    """The name that a set of masks has in the results: its own, or that of its folder or file."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    return str(entry.get("name") or Path(entry["path"]).stem)


def makes_masks(model: Any) -> bool:
    """Whether a model makes masks of what a point or a box asks for (SAM)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as KNOWN

    return type(model).__name__ in KNOWN.values()


def prompt_of(mask: NDArray[np.bool_], prompt: str) -> list[float]:
    """What asks for an object: x and y of a pixel, or a box as left, top, right, bottom.

    point: the pixel of the mask that is farthest from its edge, the picture's border being an edge too (Segment
        Anything, appendix D.1, "the center of the mask"); centroid: the pixel of the mask next to its centre of mass
    """
    rows, columns = np.nonzero(mask)
    if prompt == "box":
        return [float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max())]
    if prompt == "centroid":
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        return [float(columns[nearest]), float(rows[nearest])]
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError:
        raise ValueError(
            "prompt: point is found by scipy, which is not installed: pip install 'sparsekit-lightning[vision]'"
        ) from None

    inner = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(inner.argmax()), mask.shape)
    return [float(column), float(row)]


@torch.no_grad()
def masks_of(
    model: Any, processor: Any, picture: Any, prompts: Sequence[Sequence[float]], *, several: bool = False
) -> tuple[Tensor, Tensor]:
    """The masks (prompts, 1, height, width) that a model makes, in the picture's size, and what it thinks of each.

    processor: the model's image processor
    prompts: points, or boxes
    several: three masks for each prompt instead of one
    """
    whole = _processor_of(model, processor)
    key = "input_boxes" if len(prompts[0]) == 4 else "input_points"
    asked = [list(each) for each in prompts] if key == "input_boxes" else [[list(each)] for each in prompts]
    given = whole(images=picture, return_tensors="pt", **{key: [asked]})
    sizes = {name: given[name] for name in ("original_sizes", "reshaped_input_sizes") if name in given}
    pixels, shown = given["pixel_values"].to(model.device, model.dtype), given[key].to(model.device, model.dtype)
    out = model(pixel_values=pixels, **{key: shown}, multimask_output=several)
    logits = out.pred_masks.float().cpu()
    full = processor.post_process_masks(logits, *(size.tolist() for size in sizes.values()))[0]
    return full, out.iou_scores[0].float().cpu()


def _processor_of(model: Any, processor: Any) -> Any:
    """Transformers' processor of pictures and prompts together."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return getattr(transformers, PROCESSOR_MAPPING_NAMES[model.config.model_type])(processor)


class Overlap:
    """Mean intersection over union on a set of images with masks, through prompt encoder and decoder.

    entry: of `evaluate.iou`; `prompt` and `answer` say what is asked, and which mask counts
        single: the one that the model gives where one is wanted; likeliest: of three the one that it thinks best of;
        best: of three the one that comes nearest

    Raises ValueError for an entry that says what it cannot, and for a set whose first image cannot be read.
    """

    def __init__(self, entry: str | Mapping[str, Any], limit: int | None = None):
        entry = full_entry(entry, KEYS, "iou")
        self.path, self.name, self.found = str(entry["path"]), mask_set_name(entry), mask_set(entry)
        self.prompt, self.answer = entry.get("prompt") or "point", entry.get("answer") or "single"
        for key, value, known in (("prompt", self.prompt, PROMPTS), ("answer", self.answer, ANSWERS)):
            if value not in known:
                raise ValueError(f"iou of {self.name}: `{key}` is {value!r}, {registry.suggest(str(value), known)}")
        self.objects = entry.get("objects")
        self.chosen = spread(self.found, entry.get("limit") or limit)
        try:  # what a set lacks is said before anything heavy begins
            _, first = self.found.objects(self.chosen[0], 1)
        except OSError as error:
            raise ValueError(f"iou of {self.name}: its first image cannot be read ({error})") from error
        for mask in first:
            prompt_of(mask, self.prompt)

    def __call__(self, subject: Subject) -> dict[str, Figure]:
        """{"NAME IoU": the mean over all masks}; its error takes the masks of one image together."""
        each = [self.of_image(subject.model, subject.tokenizer, index) for index in self.chosen]
        scores = np.concatenate(each)
        if not len(scores):
            raise ValueError(f"{self.name} has no object on any of its {len(self.chosen)} images: give others")
        mean = float(scores.mean())
        spread = math.sqrt(sum(float((own - mean).sum()) ** 2 for own in each)) / len(scores)
        settings = {"set": self.path, "prompt": self.prompt, "answer": self.answer, "objects": self.objects}
        settings |= {"images": len(self.chosen)}
        figure = Figure(mean, spread, len(scores), "masks", "higher", settings, "iou")
        return {f"{self.name} IoU": figure}

    def of_image(self, model: Any, processor: Any, index: int) -> NDArray[np.float64]:
        """Intersection over union of each object of one image (objects,)."""
        from torchmetrics.functional.segmentation import mean_iou

        picture, masks = self.found.objects(index, self.objects)
        scores: list[Tensor] = []
        for start in range(0, len(masks), OBJECTS):
            some = masks[start : start + OBJECTS]
            prompts = [prompt_of(mask, self.prompt) for mask in some]
            made, thought = masks_of(model, processor, picture, prompts, several=self.answer != "single")
            target = torch.from_numpy(np.stack(some))[:, None].expand_as(made)
            over = mean_iou(made.int(), target.int(), made.shape[1], per_class=True, input_format="one-hot")
            best = thought.argmax(1) if self.answer == "likeliest" else over.argmax(1)
            scores.append(over.gather(1, best[:, None])[:, 0])
        return torch.cat(scores).double().numpy() if scores else np.zeros(0)
