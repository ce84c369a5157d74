"""Measuring a run's models, the dense one and the pruned one, and any other that is asked about."""

from functools import partial
from typing import Any

import torch
from torch import nn

from sparsekit.measure import (
    PROMPTS,
    Overlap,
    Ready,
    Walked,
    check_evaluation,
    evaluate,
    get_ready,
    labelled_images,
    mask_pictures,
    samples,
)
from sparsekit.model import (
    Block,
    adopt,
    choose_tower,
    filled,
    find_blocks,
    image_processor,
    locate,
    on_device,
    rests,
    same_tower,
    sees_images,
    towers_of,
)
from sparsekit.model import load as load_model
from sparsekit.recipe import Recipe
from sparsekit.run.plan import Plan
from sparsekit.system import session

Named = str | dict[str, Any]


def evaluate_path(
    model: Named, settings: dict[str, Any], dense: Named | None = None, *, device: str | None = None
) -> dict[str, Any]:
    """Measure any model that a recipe's `model` could name: what `evaluate.evaluate` gives.

    dense: the model that features and embeddings are compared with
    device: where to run; None: on the accelerator where there is one

    Raises:
        ValueError: there is no such model or device, or settings and model do not fit each other.
    """
    place = _device(device)

    def opened(named: Named) -> tuple[Any, Any]:
        trust = isinstance(named, dict) and bool(named.get("trust_remote_code"))
        folder = locate(named)
        loaded, reader = load_model(folder, trust_remote_code=trust)
        if settings.get("features") and not sees_images(loaded):
            if "vision" not in towers_of(loaded):
                raise ValueError(f"{type(loaded).__name__} has no tower that sees images, so features measure nothing")
            choose_tower(loaded, "vision")
            reader = image_processor(folder)
        return loaded.to(place), reader

    with session():
        loaded, tokenizer = opened(model)
        return evaluate(loaded, tokenizer, settings, dense=None if dense is None else lambda: opened(dense)[0])


def _device(asked: str | None) -> torch.device:
    there = torch.accelerator.current_accelerator()
    if asked is None:
        return there or torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", there.type if there else "cpu"}:
        found = f"the cpu and {there.type}" if there else "the cpu alone"
        raise ValueError(f"device is {asked}, and this machine has {found}")
    return device


def measure_model(
    planned: Plan, model: nn.Module, known: list[Block], tokenizer: Any, settings: dict[str, Any], ready: Ready
) -> dict[str, Any]:
    """Measure a model on the accelerator that the recipe walks on. known: its blocks, in whatever copy of it."""
    from sparsekit.system import alone

    on_disk = any(map(rests, find_blocks(model)))
    walked = Walked(adopt(model, known) if on_disk else (), planned.memory[0], planned.device)
    with alone(), on_device(model, walked.blocks, planned.device):
        found: dict[str, Any] = evaluate(model, tokenizer, settings, ready, walked)
        if planned.recipe.evaluate.samples and planned.predicts:
            with filled(walked.blocks, planned.device):
                found["samples"] = samples(model, tokenizer)
        overlaps = [each for each in ready.measures.values() if isinstance(each, Overlap)]
        if planned.recipe.evaluate.samples and overlaps:
            with filled(walked.blocks, planned.device):
                found["pictures"] = mask_pictures(model, tokenizer, overlaps[0])
        return found


def side_by_side(evaluation: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """What the dense and the pruned model make of the same prompts or pictures; taken out of their measurements."""
    said = {name: texts for name, found in evaluation.items() if (texts := found.pop("samples", []))}
    drawn = {name: pictures for name, found in evaluation.items() if (pictures := found.pop("pictures", []))}
    first: list[dict[str, str]] = next(iter(drawn.values()), [])
    return [
        {"prompt": prompt} | {name: texts[index] for name, texts in said.items()}
        for index, prompt in enumerate(PROMPTS)
        if said
    ] + [
        {"prompt": each["prompt"], "asked": each["asked"]}
        | {name: pictures[index]["made"] for name, pictures in drawn.items()}
        for index, each in enumerate(first)
    ]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What is to be measured, as `evaluate` takes it."""
    settings = recipe.evaluate.model_dump(exclude={"dense", "samples", "metrics"})
    return settings | {"metrics": [{each.name: each.options} for each in recipe.evaluate.metrics]}


def measures(recipe: Recipe) -> bool:
    """Whether a recipe asks for any figure."""
    settings = settings_of(recipe)
    return any(settings[key] for key in ("perplexity", "tasks", "accuracy", "features", "iou", "metrics"))


def ready_for(planned: Plan, tokenizer: Any, first: int | None) -> Ready:
    """All that measuring needs beside the model, read before the model is, so that a mistake costs no time."""
    settings = settings_of(planned.recipe)
    check_evaluation(settings)
    for entry in settings["accuracy"]:
        labelled_images(entry).classes(planned.model)
    dense = partial(_dense, planned)
    return get_ready(settings, tokenizer, planned.model.config, first, dense)


def _dense(planned: Plan) -> Any:
    model, _ = load_model(planned.dense, trust_remote_code=planned.recipe.model.trust_remote_code)
    same_tower(model, planned.model)
    return model.to(planned.device)
