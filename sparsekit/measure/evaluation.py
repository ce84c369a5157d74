"""How good a model is: perplexity by the published protocol, and tasks through lm-eval, on the model in memory."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsekit import registry
from sparsekit.data import check_length, corpus, no_bars, resolve, windows
from sparsekit.measure.images import accuracy, image_limit, image_set_name, labelled_images
from sparsekit.measure.metrics import Measures, Preparation, Subject, measured, prepare
from sparsekit.model import sees_images

PERPLEXITY = ("name", "length", "windows")  # keys of a perplexity entry that belong to no source
TASK = {"name", "path", "prompt", "choices", "label"}  # keys a local task must have; `limit` it may have
SEED = 1234  # of the few-shot examples; lm-eval's own default


@torch.no_grad()
def losses(model: Any, tokens: Tensor, *, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
    """Each sequence's mean cross-entropy (n,), float64, in nats, over its length - 1 predictions.

    tokens: (n, length) int64, as `data.windows` gives them. batch: sequences per forward pass.
    device: where to run, the model is moved there; None for where the model is.
    The loss is taken in fp32, one sequence at a time, so that only one sequence's logits are ever held in fp32.
    """
    from torchmetrics import CatMetric

    # Not torchmetrics.text.Perplexity: it takes the logarithm of a softmax, and one probability that underflows to 0
    # makes the perplexity of a bad model infinite. And a NaN must not be left out, as CatMetric would by itself.
    if device is not None:
        model.to(device)
    device = device or next(model.parameters()).device
    # of this process alone: what several know is for the caller to add up
    seen = CatMetric(nan_strategy="disable", sync_on_compute=False).set_dtype(torch.float64).to(device)
    training = model.training
    model.eval()
    try:
        for chunk in tokens.split(batch):
            chunk = chunk.to(device)
            logits = model(input_ids=chunk, use_cache=False).logits  # (batch, length, vocabulary)
            for each, sequence in zip(logits, chunk, strict=True):
                seen.update(cross_entropy(each[:-1].float(), sequence[1:]).double())
    finally:
        model.train(training)
    return seen.compute().double().flatten().cpu()


def perplexity(model: Any, tokens: Tensor, **options: Any) -> float:
    """exp of the mean over sequences (n, length) of `losses`. options: as there."""
    return float(losses(model, tokens, **options).mean().exp())


def evaluate(model: Any, tokenizer: Any, settings: Mapping[str, Any], ready: Ready | None = None) -> dict[str, dict]:
    """What a model is worth, by name of the text or task.

    {"perplexity": {name: value}, "perplexity_stderr": {name: value}, "tasks": {task: {metric: value}},
    "context": {name: {"length", "windows", "digest"}}}; a digest is of the tokens, there is no error with one window.

    settings:
      perplexity: a list of source names, paths to local files, or {source, name, length, windows, options...}.
      length: tokens of a window, 2048 unless told; never more than the model has positions (ValueError).
      tasks: see `tasks`. limit: documents per task, None for all. batch: sequences per forward pass, 1 unless told.
      accuracy: of a vision model, whose image processor is the tokenizer here: see `images.labelled`; among the tasks.
      metrics: others, each a name or {name: options}; their figures are under "figures", by name
    ready: what `get_ready` gave for these settings, where it was called before.
    """
    check_evaluation(settings)
    batch, limit = settings.get("batch") or 1, settings.get("limit")
    if sees_images(model) and (settings.get("perplexity") or settings.get("tasks")):
        raise ValueError(f"{type(model).__name__} sees images, and perplexity and tasks are of text: measure accuracy")
    ready = get_ready(settings, tokenizer, model.config) if ready is None else ready
    found = ready.texts
    seen = {name: losses(model, tokens, batch=batch) for name, tokens in found.items()}
    found_figures = measured(ready.measures, Subject(model, tokenizer, batch))
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
                "digest": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            }
            for name, tokens in found.items()
        },
        "tasks": {
            **(tasks(model, tokenizer, settings["tasks"], limit=limit, batch=batch) if settings.get("tasks") else {}),
            **{
                image_set_name(entry): accuracy(
                    model, tokenizer, labelled_images(entry), batch=batch, limit=image_limit(entry) or limit
                )
                for entry in settings.get("accuracy") or []
            },
        },
        **({"figures": found_figures} if found_figures else {}),
    }


@dataclass(frozen=True)
class Ready:
    """What is read before a model is: the windows (n, length) of every text, and metrics with their data."""

    texts: Mapping[str, Tensor]
    measures: Measures


def get_ready(settings: Mapping[str, Any], tokenizer: Any, config: Any) -> Ready:
    """Read all that `evaluate` needs beside the model. Raises ValueError for what cannot be had or used."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    common = {key: settings[key] for key in ("length", "batch", "limit") if settings.get(key)}
    preparation = Preparation(tokenizer, config, **common)
    texts = perplexity_windows(settings, tokenizer, positions)
    measures = prepare(settings.get("metrics") or [], preparation)
    _check_named(settings.get("tasks") or [])
    return Ready(texts, measures)


def _check_named(entries: Sequence[Any]) -> None:
    """Raise ValueError for a task that lm-eval does not have, with the nearest names."""
    named = [entry for entry in entries if isinstance(entry, str) and not _is_yaml(entry)]
    if not named:
        return
    with _quiet():
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks  # reading its 14,000 tasks takes a quarter of a minute
    for name in named:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
            raise ValueError(f"lm-eval has no task `{name}`; the nearest names are: {near}")


def perplexity_windows(settings: Mapping[str, Any], tokenizer: Any, positions: int | None = None) -> dict[str, Tensor]:
    """The windows (n, length) of every perplexity set by its name; settings as `evaluate` takes them.

    positions: size of the model's position table. Raises ValueError if a text cannot be had or is too short, or a
    window is longer than the table.
    """
    found = {}
    for entry in settings.get("perplexity") or []:
        name, entry = _name(entry), _mapping(entry)
        length = entry.get("length") or settings.get("length") or 2048
        check_length(length, positions, f"perplexity of {name}:")
        found[name] = windows(corpus(entry, "test", PERPLEXITY), tokenizer, length, entry.get("windows"))
    return found


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what can be seen to be wrong without a model, a tokenizer, network or lm-eval."""
    known = ("perplexity", "length", "tasks", "accuracy", "metrics", "limit", "batch")
    for key in settings:
        if key not in known:
            raise ValueError(f"evaluate: unknown key `{key}`, {registry.suggest(key, known)}")
    whole = [(key, settings.get(key)) for key in ("length", "limit", "batch")]
    names = []
    for entry in settings.get("perplexity") or []:
        resolve(_mapping(entry), PERPLEXITY)
        names.append(_name(entry))
        whole += [(f"{_name(entry)}: {key}", _mapping(entry).get(key)) for key in ("length", "windows")]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"evaluate: two perplexity sets are called `{twice.pop()}`: give one of them another `name`")
    sets = [image_set_name(entry) for entry in settings.get("accuracy") or []]
    if twice := {name for name in sets if sets.count(name) > 1}:
        raise ValueError(f"evaluate: two sets of images are called `{twice.pop()}`: give one of them another `name`")
    for task in settings.get("tasks") or []:
        _check_task(task)
    for key, value in whole:
        least = 2 if key.endswith("length") else 1
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"evaluate: `{key}` is {value!r}, must be a whole number of at least {least}")


def tasks(
    model: Any, tokenizer: Any, entries: list[str | Mapping[str, Any]], *, limit: int | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Zero-shot figures through lm-eval: {task: {metric: value, metric_stderr: value, "n": documents}}.

    entries: each one a task name of lm-eval (data from the hub), a path to an lm-eval YAML file, or a mapping
    {name, path, prompt, choices, label, limit} that describes multiple choice over a local JSON-lines file: `prompt`,
    `choices` (or a list) and `label` (an index from 0, or the text of the right choice) are Jinja templates over the
    record. An answer follows the prompt after one blank. `acc` takes the likeliest answer, `acc_norm` the likeliest
    per character.
    """
    for entry in entries:
        _check_task(entry)
    with _quiet():
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # Reading lm-eval's own 14,000 tasks takes a quarter of a minute: only where one of them is named.
        named = any(isinstance(entry, str) and not _is_yaml(entry) for entry in entries)
        manager = TaskManager(include_defaults=named)
        loaded = [_task(manager, entry) for entry in entries]
        training = model.training
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found: dict[str, dict[str, float]] = {}
        for entry, task in zip(entries, loaded, strict=True):
            own = entry.get("limit") if isinstance(entry, Mapping) else None
            # bootstrap_iters: means have a closed formula and use none of them
            results = evaluator.evaluate(harness, task, limit=own or limit, bootstrap_iters=1000, log_samples=False)
            for name, values in results["results"].items():
                found[name] = _figures(values)
                if name in results["n-samples"]:
                    found[name]["n"] = results["n-samples"][name]["effective"]
        model.train(training)
    return found


def _task(manager: Any, entry: str | Mapping[str, Any]) -> dict:
    """The task objects of one entry, as lm-eval loads them, with their data."""
    spec: Any = entry if isinstance(entry, str) else local_task(entry)
    name = entry if isinstance(entry, str) else entry["name"]
    try:
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(SEED)
            if not isinstance(entry, str):
                _check_labels(task)
    except Exception as error:  # data sets, templates and YAML files are other people's and raise anything
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if isinstance(error, IndexError) and isinstance(entry, Mapping):  # lm-eval looks its answer up by itself
            reason = "the label of the first record is none of its choices"
        raise ValueError(f"the task `{name}` cannot be loaded ({reason})") from error
    return loaded


def local_task(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The lm-eval configuration of a multiple-choice task over a local JSON-lines file."""
    return {
        "task": entry["name"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(entry["path"]).resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": entry["prompt"],
        "doc_to_choice": entry["choices"],
        "doc_to_target": entry["label"],
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
    }


METRICS = ("acc", "acc_norm")


def _check_labels(task: Any) -> None:
    """lm-eval counts a label that is none of the choices as a wrong answer, and only logs it."""
    for number, record in enumerate(task.test_docs()):
        choices, label = task.doc_to_choice(record), task.doc_to_target(record)
        if not (label in choices if isinstance(label, str) else 0 <= label < len(choices)):
            raise ValueError(f"record {number} has the label {label!r}, which is none of its choices {choices}")


def _check_task(entry: Any) -> None:
    if isinstance(entry, str):
        if _is_yaml(entry) and not Path(entry).is_file():
            raise ValueError(f"there is no task file `{entry}`")
        return
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a task is a name, a YAML file or a mapping with a `name`, not {entry!r}")
    for key in entry:
        if key not in TASK | {"limit"}:
            raise ValueError(f"task `{entry['name']}`: unknown key `{key}`, {registry.suggest(key, TASK | {'limit'})}")
    if missing := TASK - set(entry):
        raise ValueError(f"task `{entry['name']}` needs {', '.join(f'`{key}`' for key in sorted(missing))}")
    if not Path(entry["path"]).is_file():
        raise ValueError(f"task `{entry['name']}`: there is no file `{entry['path']}`")


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """{"acc": ..., "acc_stderr": ...} of lm-eval's {"acc,none": ..., "acc_stderr,none": ..., "alias": ...}.

    The filter stays in the name where it is not lm-eval's "none", as several may give the same metric.
    """
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _mapping(entry: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"source": entry} if isinstance(entry, str) else entry


def _name(entry: str | Mapping[str, Any]) -> str:
    """The name a perplexity set has in the results: its own, or that of its source or file."""
    entry = _mapping(entry)
    return entry.get("name") or Path(entry.get("path") or entry["source"]).name


def _is_yaml(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks on its own workings kept back; its errors, and its progress over the requests, are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with no_bars():
            yield
    finally:
        logger.setLevel(level)
