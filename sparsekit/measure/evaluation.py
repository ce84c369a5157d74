"""How good a model is: perplexity by the published protocol, and tasks through lm-eval, on the model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit import registry
from sparsekit.data import check_length, corpus, positions_of, resolve, windows
from sparsekit.measure.features import Features
from sparsekit.measure.first import BOS, beginning, first_token
from sparsekit.measure.images import accuracy, image_limit, image_set_name, labelled_images
from sparsekit.measure.masks import Overlap, makes_masks, mask_set_name
from sparsekit.measure.metrics import Measures, Preparation, Subject, measured, prepare
from sparsekit.measure.predictions import Walked, surprises
from sparsekit.measure.tasks import check_named, check_task, tasks
from sparsekit.model import filled, predicts_text, sees_images

PERPLEXITY = ("name", "length", "windows")  # keys of a perplexity entry that belong to no source


@torch.no_grad()
def losses(model: Any, tokens: Tensor, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
    """Each sequence's mean cross-entropy (n,), float64, in nats, over its length - 1 predictions.

    tokens: (n, length) int64, as `data.windows` gives them
    device: where to run, the model is moved there; None for where the model is. options: of `surprises`
    """
    from torchmetrics import CatMetric

    # Not torchmetrics.text.Perplexity: it takes the logarithm of a softmax, and one probability that underflows to 0
    # makes the perplexity of a bad model infinite. And a NaN must not be left out, as CatMetric would by itself.
    if device is not None:
        model.to(device)
    # of this process alone: what several know is for the caller to add up
    seen = CatMetric(nan_strategy="disable", sync_on_compute=False).set_dtype(torch.float64)
    training = model.training
    model.eval()
    try:
        for each in surprises(model, tokens, **options):
            seen.update(each.mean().cpu().double())
    finally:
        model.train(training)
    return seen.compute().double().flatten().cpu()


def perplexity(model: Any, tokens: Tensor, **options: Any) -> float:
    """exp of the mean over sequences (n, length) of `losses`. options: as there."""
    return float(losses(model, tokens, **options).mean().exp())


def evaluate(
    model: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
    ready: Ready | None = None,
    walked: Walked | None = None,
    dense: Callable[[], Any] | None = None,
) -> dict[str, dict]:
    """What a model is worth, by name of the text or task.

    {"perplexity": {name: value}, "perplexity_stderr": {name: value}, "tasks": {task: {metric: value}},
    "context": {name: {"length", "windows", "digest"}}, "bos": {"used", "why"}}; a digest is of the tokens, there is no
    error with one window.

    settings:
      perplexity: a list of source names, paths to local files, or {source, name, length, windows, options...}.
      length: tokens of a window, 2048 unless told; never more than the model has positions (ValueError).
      tasks: see `tasks`. limit: documents per task, None for all. batch: sequences per forward pass, 1 unless told.
      accuracy: of a vision model, whose image processor is the tokenizer here: see `images.labelled`; among the tasks.
      features: of a vision model, images: see `features.Features`; its figures are under "figures"
      iou: of a model that cuts objects out, images with masks: see `masks.Overlap`; its figures are under "figures"
      bos: whether the first token stands before every window: auto, window or published; see `first_token`.
      metrics: others, each a name or {name: options}; their figures are under "figures", by name
    ready: what `get_ready` gave for these settings, where it was called before.
    dense: opens the dense model, which `features` are compared with where ready is None
    walked: how to go through a model whose blocks rest on disk: texts, and what tasks ask the likelihood of, block by
        block; what generates, and metrics, with all blocks filled meanwhile. None: the model is in memory
    """
    check_evaluation(settings)
    batch, limit = settings.get("batch") or 1, settings.get("limit")
    if sees_images(model) and (settings.get("perplexity") or settings.get("tasks")):
        raise ValueError(
            f"{type(model).__name__} sees images, and perplexity and tasks are of text: measure accuracy, or iou"
        )
    if settings.get("iou") and not makes_masks(model):
        raise ValueError(f"{type(model).__name__} cuts no objects out, so iou has nothing to measure; leave it out")
    first = None
    if ready is None:
        texts = settings.get("perplexity") or [""]
        bos = (settings.get("bos") or "auto") if predicts_text(model) else "published"
        first = first_token(bos, tokenizer, lambda: model, lambda: texts[0] and beginning(texts[0], "test"))
        ready = get_ready(settings, tokenizer, model.config, first.token, dense)
    found = ready.texts
    walked = walked or Walked()
    seen = {name: losses(model, tokens, batch=batch, walked=walked) for name, tokens in found.items()}
    more = ready.measures or settings.get("accuracy")
    with filled(walked.blocks if more else (), walked.device):
        found_figures = measured(ready.measures, Subject(model, tokenizer, batch))
        of_images = _accuracies(model, tokenizer, settings, batch, limit)
    named = settings.get("tasks")
    said = tasks(model, tokenizer, named, limit=limit, batch=batch, walked=walked) if named else {}
    return {
        "perplexity": {name: float(each.mean().exp()) for name, each in seen.items()},
        # of the mean loss, carried over to its exponential (delta method); windows are not independent, so it is rough
        "perplexity_stderr": {
            name: float(each.mean().exp() * each.std() / len(each) ** 0.5)
            for name, each in seen.items()
            if len(each) > 1
        },
        "context": {
            name: {
                "length": tokens.shape[1],
                "windows": len(tokens),
                **({"first_token": ready.first} if ready.first is not None else {}),
                "digest": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            }
            for name, tokens in found.items()
        },
        "tasks": said | of_images,
        **({"figures": found_figures} if found_figures else {}),
        **({"bos": {"used": first.used, "why": first.why}} if first is not None else {}),
    }


def _accuracies(
    model: Any, tokenizer: Any, settings: Mapping[str, Any], batch: int, limit: int | None
) -> dict[str, Any]:
    """Figures of tasks over images."""
    found: dict[str, Any] = {}
    for entry in settings.get("accuracy") or []:
        count = image_limit(entry) or limit
        found[image_set_name(entry)] = accuracy(model, tokenizer, labelled_images(entry), batch=batch, limit=count)
    return found


@dataclass(frozen=True)
class Ready:
    """What is read before a model is: the windows (n, length) of every text, and metrics with their data."""

    texts: Mapping[str, Tensor]
    measures: Measures
    first: int | None = None  # the token that stands before every window


def get_ready(
    settings: Mapping[str, Any],
    tokenizer: Any,
    config: Any,
    first: int | None = None,
    dense: Callable[[], Any] | None = None,
) -> Ready:
    """Read all that `evaluate` needs beside the model. Raises ValueError for what cannot be had or used.

    first: the token that stands before every window; None: windows are cut as published
    dense: opens the dense model, which features and embeddings are compared with; None: it is nowhere to be had
    """
    positions = positions_of(config)
    common = {key: settings[key] for key in ("length", "batch", "limit") if settings.get(key)}
    preparation = Preparation(tokenizer, config, **common, first=first, dense=dense)
    texts = perplexity_windows(settings, tokenizer, positions, first)
    measures = prepare(settings.get("metrics") or [], preparation)
    for entry in settings.get("features") or []:
        if dense is None:
            raise ValueError("features are compared with the dense model's, and which that is was not said: give it")
        given = (settings.get("limit"), settings.get("batch") or 1)
        measures[f"features of {image_set_name(entry)}"] = Features(entry, dense, *given)
    for entry in settings.get("iou") or []:
        measures[f"iou of {mask_set_name(entry)}"] = Overlap(entry, settings.get("limit"))
    check_named(settings.get("tasks") or [])
    return Ready(texts, measures, first)


def perplexity_windows(
    settings: Mapping[str, Any], tokenizer: Any, positions: int | None = None, first: int | None = None
) -> dict[str, Tensor]:
    """The windows (n, length) of every perplexity set by its name; settings as `evaluate` takes them.

    positions: size of the model's position table. Raises ValueError if a text cannot be had or is too short, or a
    window is longer than the table.
    """
    found = {}
    for entry in settings.get("perplexity") or []:
        name, entry = _name(entry), _mapping(entry)
        length = entry.get("length") or settings.get("length") or 2048
        check_length(length, positions, f"perplexity of {name}:")
        found[name] = windows(corpus(entry, "test", PERPLEXITY), tokenizer, length, entry.get("windows"), first)
    return found


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what can be seen to be wrong without a model, a tokenizer, network or lm-eval."""
    known = ("perplexity", "length", "tasks", "accuracy", "features", "iou", "metrics", "limit", "batch", "bos")
    for key in settings:
        if key not in known:
            raise ValueError(f"evaluate: unknown key `{key}`, {registry.suggest(key, known)}")
    if settings.get("bos") not in (None, *BOS):
        raise ValueError(f"evaluate: `bos` is {settings['bos']!r}, {registry.suggest(str(settings['bos']), BOS)}")
    whole = [(key, settings.get(key)) for key in ("length", "limit", "batch")]
    names = []
    for entry in settings.get("perplexity") or []:
        resolve(_mapping(entry), PERPLEXITY)
        names.append(_name(entry))
        whole += [(f"{_name(entry)}: {key}", _mapping(entry).get(key)) for key in ("length", "windows")]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"evaluate: two perplexity sets are called `{twice.pop()}`: give one of them another `name`")
    for key, called in (("accuracy", image_set_name), ("features", image_set_name), ("iou", mask_set_name)):
        sets = [called(entry) for entry in settings.get(key) or []]
        if twice := {name for name in sets if sets.count(name) > 1}:
            raise ValueError(
                f"evaluate.{key}: two sets of images are called `{twice.pop()}`: give one of them another `name`"
            )
    for task in settings.get("tasks") or []:
        check_task(task)
    for key, value in whole:
        least = 2 if key.endswith("length") else 1
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"evaluate: `{key}` is {value!r}, must be a whole number of at least {least}")


def _mapping(entry: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"source": entry} if isinstance(entry, str) else entry


def _name(entry: str | Mapping[str, Any]) -> str:
    """The name a perplexity set has in the results: its own, or that of its source or file."""
    entry = _mapping(entry)
    return entry.get("name") or Path(entry.get("path") or entry["source"]).name
