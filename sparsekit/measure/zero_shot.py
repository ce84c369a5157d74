"""How often a model that compares images with texts names an image rightly, by the names of the classes alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from sparsekit.contracts import Count, Figure, Measure, Preparation
from sparsekit.data import images, spread
from sparsekit.model import channels_of, image_processor, load_tokenizer

if TYPE_CHECKING:
    from sparsekit.contracts import Subject


def zero_shot(
    preparation: Preparation, *, path: str, template: str = "a photo of a {}.", limit: Count | None = None
) -> Measure:
    """Accuracy of CLIP, SigLIP and their like on labelled images that they were not trained to sort.

    path: a folder with a folder for each class, called by its name in words, or what else `evaluate.accuracy` takes.
    template: the sentence that a class is named in. limit: so many images, evenly from all.

    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.2 (one prompt of them).
    """
    if "{}" not in template:
        raise ValueError(f"template is {template!r}, and must have {{}} where the name of the class goes")
    found = images("test", path=path)
    if found.label not in found.rows.features:
        raise ValueError(f"{path} has no labels: give a folder with a folder for each class")
    names = getattr(found.rows.features[found.label], "names", None) or sorted(set(map(str, found.rows[found.label])))
    folder = Path(str(getattr(preparation.config, "_name_or_path", "") or ""))
    tokenizer, processor = load_tokenizer(folder), image_processor(folder)
    chosen = spread(found, limit or preparation.limit)
    labels = torch.tensor(list(found.rows[found.label]))[chosen]
    said = [template.format(name.replace("_", " ")) for name in names]

    @torch.no_grad()
    def measure(subject: Subject) -> dict[str, Figure]:
        model = subject.model
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise ValueError(
                f"{type(model).__name__} compares no images with texts, so zero-shot has nothing to measure"
            )
        wide = getattr(model.config.text_config, "max_position_embeddings", None)
        given = tokenizer(said, padding="max_length", truncation=True, max_length=wide, return_tensors="pt")
        # SigLIP is trained with what fills a text up, and reads it; CLIP's mask leaves it out
        mask = (
            {} if "siglip" in model.config.model_type else {"attention_mask": given["attention_mask"].to(model.device)}
        )
        texts = _pooled(model.get_text_features(input_ids=given["input_ids"].to(model.device), **mask))
        right = []
        for start in range(0, len(chosen), subject.batch):
            pixels = found.pixels(chosen[start : start + subject.batch], processor, channels_of(model.config))
            seen = _pooled(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)))
            right.append((seen @ texts.t()).argmax(1) == labels[start : start + subject.batch])
        each = torch.cat(right).double()
        error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else None
        settings = {"path": path, "images": len(each), "template": template}
        name = f"{Path(path).name} zero-shot"
        return {name: Figure(float(each.mean()), error, len(each), "images", "higher", settings, "zero-shot accuracy")}

    return measure


def _pooled(out: Any) -> torch.Tensor:
    """Unit vectors (n, width) of what a model gives as features."""
    return normalize(getattr(out, "pooler_output", out).float().cpu(), dim=-1)
