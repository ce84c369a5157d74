"""How near the features of a vision model are to the dense model's, and what their neighbours know."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparsekit.contracts import Figure
from sparsekit.data import Images, images, spread
from sparsekit.measure.images import KEYS, OPTIONS, full_entry, image_set_name
from sparsekit.model import channels_of, chosen_tower, features

if TYPE_CHECKING:
    from sparsekit.measure.metrics import Subject

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's protocol (Caron et al. 2021, section 4.1)


@torch.no_grad()
def features_of(model: Any, processor: Any, found: Images, chosen: Sequence[int], batch: int) -> tuple[Tensor, Tensor]:
    """`model.features` of some images, float32 in CPU memory."""
    seen = []
    for start in range(0, len(chosen), batch):
        pixels = found.pixels(chosen[start : start + batch], processor, channels_of(chosen_tower(model).config))
        seen.append([each.float().cpu() for each in features(model, pixels.to(model.device, model.dtype))])
    whole, places = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return whole, places


class Features:
    """Cosine of a model's features to the dense model's, and accuracy by nearest neighbours where images are labelled.

    entry: of `evaluate.features`. dense: opens the dense model, when it is first needed

    Raises ValueError for an entry or images that do not serve.
    """

    def __init__(
        self,
        entry: str | Mapping[str, Any],
        dense: Callable[[], Any],
        limit: int | None = None,
        batch: int = 1,
    ):
        entry = full_entry(entry, (*KEYS, "neighbours", "side"), "features")
        self.path, self.name, self.batch, self.dense = str(entry["path"]), image_set_name(entry), batch, dense
        given = {key: entry[key] for key in (*OPTIONS, "side") if entry.get(key) is not None}
        self.found = images("test", path=entry["path"], **given)
        self.chosen = spread(self.found, entry.get("limit") or limit)
        self.neighbours: int = entry.get("neighbours") or 0
        self.gallery: Images | None = None
        if self.neighbours:
            self.gallery = images("calibration", path=entry["path"], **given)
            if self.gallery.rows.split == self.found.rows.split:  # each would be its own nearest neighbour
                raise ValueError(
                    f"{self.name} has one part, `{self.found.rows.split}`, and neighbours are looked for in another: "
                    "give a folder with train/CLASS/ and test/CLASS/, without `part`, or leave out `neighbours`"
                )
            for each in (self.found, self.gallery):
                if each.label not in each.rows.features:
                    raise ValueError(
                        f"{self.name} has no labels called `{each.label}`, for which neighbours are asked: give a "
                        "folder with train/CLASS/ and test/CLASS/, name the column by `label`, or leave it out"
                    )
        self.reference: tuple[Tensor, Tensor] | None = None

    def __call__(self, subject: Subject) -> dict[str, Figure]:
        """{"NAME cosine": of whole images, "NAME cosine of places", "NAME neighbours": accuracy}"""
        model, processor = subject.model, subject.tokenizer
        own = features_of(model, processor, self.found, self.chosen, self.batch)
        if self.reference is None:
            self.reference = features_of(self.dense(), processor, self.found, self.chosen, self.batch)
        settings: dict[str, Any] = {"set": self.path, "images": len(self.chosen)}
        figures = {}
        for title, mine, dense in zip(("cosine", "cosine of places"), own, self.reference, strict=True):
            near = cosine_similarity(mine, dense, dim=-1).double().reshape(len(mine), -1).mean(1)
            figures[f"{self.name} {title}"] = _mean(near, settings)
        if self.gallery is not None:
            known = list(range(len(self.gallery)))
            labels = [torch.tensor(list(each.rows[each.label])) for each in (self.gallery, self.found)]
            gallery, _ = features_of(model, processor, self.gallery, known, self.batch)
            said = by_neighbours(own[0], gallery, labels[0], self.neighbours)
            right = (said == labels[1][self.chosen]).double()
            figures[f"{self.name} neighbours"] = _mean(right, settings | {"neighbours": self.neighbours})
        return figures


def by_neighbours(asked: Tensor, gallery: Tensor, labels: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """The class of each feature (asked,): the votes of its nearest ones, weighted by exp(cosine / 0.07).

    asked: (asked, width); gallery: (known, width), labels: (known,)
    Source: Wu et al. 2018, section 3.4, as DINO has it.
    """
    near, which = (normalize(asked, dim=1) @ normalize(gallery, dim=1).t()).topk(min(count, len(gallery)), dim=1)
    votes = torch.zeros(len(asked), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[which], (near / TEMPERATURE).exp())
    return votes.argmax(1)


def _mean(values: Tensor, settings: dict[str, Any]) -> Figure:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(float(values.mean()), error, len(values), "images", "higher", settings, "features")
