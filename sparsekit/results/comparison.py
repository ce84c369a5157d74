"""Finished runs side by side: what may be compared, and the refusal of what may not."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekit.contracts import Figure
from sparsekit.measure import image_set_name
from sparsekit.model import read_json
from sparsekit.results.figures import PERPLEXITY, TASK, figures_of
from sparsekit.results.folder import REPORT, STATE
from sparsekit.results.report import read_report

SIZES = ("length", "windows")  # tokens a window, and how many


@dataclass(frozen=True)
class Run:
    """A finished run: the folder as it was given, and its report."""

    path: str
    report: dict[str, Any]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """What was measured of the result; in `settings` all that must agree for a comparison."""
        return {
            name: replace(each, settings=each.settings | self._asked(name, each))
            for name, each in figures_of(self.report["evaluation"]["pruned"]).items()
        }

    def _asked(self, name: str, figure: Figure) -> dict[str, Any]:
        """What the recipe says of a text or a local task. A digest of a text's very tokens stands for all of it."""
        given = self.report["recipe"]["evaluate"]
        if figure.kind == PERPLEXITY and "digest" not in figure.settings:
            texts = zip(self.report["evaluation"]["pruned"]["perplexity"], given.get("perplexity") or [], strict=True)
            asked = {key: value for key, value in dict(texts).get(name, {}).items() if key not in ("name", *SIZES)}
            return asked | {"tokenizer": self.vocabulary}
        tasks = {task["name"]: task for task in given.get("tasks") or [] if isinstance(task, dict)}
        tasks |= {image_set_name(entry): entry for entry in given.get("accuracy") or []}
        return {"question": tasks.get(name.rpartition(" ")[0])} if figure.kind == TASK else {}

    @cached_property
    def vocabulary(self) -> str:
        """What its perplexities are per token of: a digest of how the tokenizer cuts text, or the model's name."""
        file = Path(self.path) / "model" / "tokenizer.json"
        if not file.is_file():
            return f"that of {self.report['model']['name']}"
        content = read_json(file)
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
    found = read_report(folder, "model", "recipe", "stages", "sparsity", "verified")
    if not figures_of((found.get("evaluation") or {}).get("pruned")):
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
        if not run.figures.keys() & runs[0].figures.keys():
            raise ValueError(
                f"{run.path} cannot be compared with {runs[0].path}: it was measured on "
                f"{', '.join(run.figures)}, the other on {', '.join(runs[0].figures)}"
            )


def _differences(one: Run, two: Run) -> Iterator[str]:
    """Why figures that both runs have do not compare: what was measured in the second, what in the first."""
    for name in sorted(one.figures.keys() & two.figures.keys()):
        first, second = one.figures[name].settings, two.figures[name].settings
        keys = sorted(first.keys() | second.keys())
        if ("digest" in first) != ("digest" in second):  # a report of an earlier version has none
            keys = [key for key in keys if key in SIZES]
        for key in keys:
            if first.get(key) == second.get(key):
                continue
            if key == "tokenizer":
                names = [run.report["model"]["name"] for run in (two, one)]
                yield f"their tokenizers differ ({names[0]}, {names[1]}), so {name} is per other tokens"
            elif key == "digest":
                yield f"the text called {name} gives other tokens"
            elif key == "question":
                yield f"{name} asks something else"
            else:
                yield f"{name} was measured with {key} {second.get(key)!r}, in the other {first.get(key)!r}"
