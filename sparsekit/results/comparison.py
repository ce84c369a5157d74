"""Finished runs side by side: what may be compared, and the refusal of what may not."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekit.measure import image_set_name
from sparsekit.results.folder import REPORT, STATE


@dataclass(frozen=True)
class Run:
    """A finished run: the folder as it was given, and its report."""

    path: str
    report: dict[str, Any]

    @cached_property
    def pruned(self) -> dict[str, Any]:
        """What was measured of the result."""
        return self.report["evaluation"]["pruned"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the recipe's `evaluate` says of each text and each local task: {name: its entry}."""
        given = self.report["recipe"]["evaluate"]
        texts = zip(self.pruned.get("perplexity", {}), given.get("perplexity") or [], strict=True)
        tasks = {task["name"]: task for task in given.get("tasks") or [] if isinstance(task, dict)}
        tasks |= {image_set_name(entry): entry for entry in given.get("accuracy") or []}
        return {"perplexity": dict(texts), "tasks": tasks}

    @cached_property
    def vocabulary(self) -> str:
        """What its perplexities are per token of: a digest of how the tokenizer cuts text, or the model's name."""
        file = Path(self.path) / "model" / "tokenizer.json"
        if not file.is_file():
            return f"that of {self.report['model']['name']}"
        content = json.loads(file.read_text(encoding="utf-8"))
        cuts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(cuts, sort_keys=True).encode()).hexdigest()


def read_run(path: str) -> Run:
    """The run in a folder.

    Raises:
        ValueError: there is none, it is not finished, or nothing of its result was measured.
    """
    folder = Path(path)
    if not (folder / REPORT).is_file():
        if (folder / STATE).is_file():
            raise ValueError(f"{path} is not finished: continue it with --resume, or leave it out")
        raise ValueError(f"{path} is no run: it has no {REPORT}; give folders that `sparsekit fit` wrote")
    found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    pruned = (found.get("evaluation") or {}).get("pruned") or {}
    if not any(pruned.get(key) for key in ("perplexity", "tasks", "figures")):
        raise ValueError(f"{path} was not measured: its recipe has no `evaluate`; see `sparsekit eval` for one model")
    return Run(path, found)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError where figures of the same name do not mean the same in all runs, or there is none in common.

    Texts must agree in source, windows, length and tokenizer (exactly the same tokens, where reports tell their
    digests); tasks in what they ask, the limit and the number of documents.
    """
    folders = [Path(run.path).resolve() for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"{twice[0]} is given twice; give each run once")
    for number, run in enumerate(runs):
        for other in runs[:number]:
            for difference in _differences(other, run):
                raise ValueError(
                    f"{run.path} cannot be compared with {other.path}: {difference}; "
                    f"leave one out, or measure both alike with `sparsekit eval {run.path} --against {other.path}`"
                )
        if not set(figures(run.pruned)) & set(figures(runs[0].pruned)):
            raise ValueError(
                f"{run.path} cannot be compared with {runs[0].path}: it was measured on "
                f"{', '.join(figures(run.pruned))}, the other on {', '.join(figures(runs[0].pruned))}"
            )


def _differences(one: Run, two: Run) -> Iterator[str]:
    """Why figures that both runs have do not compare: what was measured in the second, what in the first."""
    texts = one.pruned.get("perplexity", {}).keys() & two.pruned.get("perplexity", {}).keys()
    loose = []
    for name in sorted(texts):
        first, second = (run.pruned.get("context", {}).get(name, {}) for run in (one, two))
        for key, what in (("length", "tokens a window"), ("windows", "windows")):
            if first.get(key) != second.get(key):
                yield f"the text {name} was measured with {second.get(key)} {what}, in the other {first.get(key)}"
        if "digest" in first and "digest" in second:  # of the very tokens: nothing else needs to agree
            if first["digest"] != second["digest"]:
                yield f"the text called {name} gives other tokens"
            continue
        loose.append(name)
        sources = [run.settings["perplexity"].get(name, {}) for run in (one, two)]
        for key in sorted((sources[0].keys() | sources[1].keys()) - {"name", "length", "windows"}):
            if sources[0].get(key) != sources[1].get(key):
                yield f"the text {name} has {key} {sources[1].get(key)!r}, in the other {sources[0].get(key)!r}"
    if loose and one.vocabulary != two.vocabulary:
        names = [run.report["model"]["name"] for run in (two, one)]
        yield f"their tokenizers differ ({names[0]}, {names[1]}), so their perplexities are per other tokens"
    both = [run.pruned.get("figures", {}) for run in (one, two)]
    for name in sorted(both[0].keys() & both[1].keys()):
        if both[0][name]["settings"] != both[1][name]["settings"]:
            yield f"{name} was measured with {both[1][name]['settings']}, in the other {both[0][name]['settings']}"
    tasks = one.pruned.get("tasks", {}).keys() & two.pruned.get("tasks", {}).keys()
    for name in sorted(tasks):
        counts = [run.pruned["tasks"][name].get("n") for run in (one, two)]
        if counts[0] != counts[1]:
            yield f"the task {name} was measured on {counts[1]} documents, in the other on {counts[0]}"
        if one.settings["tasks"].get(name) != two.settings["tasks"].get(name):
            yield f"the task {name} asks something else"


def figures(measured: dict[str, Any]) -> dict[str, float]:
    """{text: perplexity, "task metric": value}."""
    tasks = {
        f"{task} {metric}": value
        for task, metrics in measured.get("tasks", {}).items()
        for metric, value in metrics.items()
        if metric != "n" and not metric.endswith("_stderr")
    }
    others = {name: figure["value"] for name, figure in measured.get("figures", {}).items()}
    return measured.get("perplexity", {}) | tasks | others
