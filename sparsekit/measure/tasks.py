"""Tasks of lm-eval: by name, by YAML file, or over a local file; their templates are data and run in a sandbox."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.data import no_bars
from sparsekit.measure.harness import harness_for
from sparsekit.measure.predictions import Walked
from sparsekit.measure.templates import check_task_file, check_template, sandboxed

TASK = {"name", "path", "prompt", "choices", "label"}  # keys a local task must have; `limit` it may have
SEED = 1234  # of the few-shot examples; lm-eval's own default


def check_named(entries: Sequence[Any]) -> None:
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


def tasks(
    model: Any,
    tokenizer: Any,
    entries: list[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    batch: int = 1,
    walked: Walked | None = None,
) -> dict[str, dict[str, float]]:
    """Zero-shot figures through lm-eval: {task: {metric: value, metric_stderr: value, "n": documents}}.

    entries: each one a task name of lm-eval (data from the hub), a path to an lm-eval YAML file, or a mapping
    {name, path, prompt, choices, label, limit} that describes multiple choice over a local JSON-lines file: `prompt`,
    `choices` (or a list) and `label` (an index from 0, or the text of the right choice) are Jinja templates over the
    record. An answer follows the prompt after one blank. `acc` takes the likeliest answer, `acc_norm` the likeliest
    per character. walked: where the model's blocks rest on disk, see `harness.harness_for`
    """
    for entry in entries:
        check_task(entry)
    with _quiet():
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        # Reading lm-eval's own 14,000 tasks takes a quarter of a minute: only where one of them is named.
        named = any(isinstance(entry, str) and not _is_yaml(entry) for entry in entries)
        manager = TaskManager(include_defaults=named)
        loaded = [_task(manager, entry) for entry in entries]
        training = model.training
        harness = harness_for(model, tokenizer, batch, walked or Walked())
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


def check_task(entry: Any) -> None:
    """Raise ValueError for a task that cannot be asked or would run code, as far as this is seen without lm-eval."""
    if isinstance(entry, str):
        if _is_yaml(entry):
            check_task_file(Path(entry))
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
    for key in ("prompt", "choices", "label"):
        for template in entry[key] if isinstance(entry[key], list) else [entry[key]]:
            try:
                check_template(template)
            except ValueError as error:
                raise ValueError(f"task `{entry['name']}`: `{key}` {error}") from error


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """{"acc": ..., "acc_stderr": ...} of lm-eval's {"acc,none": ..., "acc_stderr,none": ..., "alias": ...}.

    The filter stays in the name where it is not lm-eval's "none", as several may give the same metric.
    """
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _is_yaml(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks on its own workings kept back; its errors, and its progress over the requests, are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with no_bars(), sandboxed():
            yield
    finally:
        logger.setLevel(level)
