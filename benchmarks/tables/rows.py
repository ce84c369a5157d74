"""The rows of a paper's table as recipes: what the files beside this one say, for one model."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sparsekit.plugins import suggest
from sparsekit.recipe import Recipe, RecipeError, check_options, load_recipe, resolved

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One row: its labels, what to run, and the paper's figures by name (empty for a model the paper does not have)."""

    method: str
    pattern: str
    swept: str
    dense: bool
    recipe: Recipe
    paper: Mapping[str, float]

    @property
    def label(self) -> str:
        """What a user can choose the row by: "SparseGPT 2:4"."""
        return " ".join(filter(None, (self.method, self.pattern, self.swept)))

    @property
    def folder(self) -> str:
        """A name that changes with anything that may change the figures, so that equal runs of two tables are one."""
        plain = resolved(self.recipe)
        keys = ("model", "evaluate") if self.dense else plain.keys() - {"output", "memory", "keep"}
        text = json.dumps({key: plain[key] for key in sorted(keys)}, sort_keys=True)
        stages = "dense" if self.dense else "-".join(stage.name for stage in self.recipe.stages)
        pattern = "" if self.dense else "-" + self.recipe.pattern.replace("%", "").replace(":", "of")
        return f"{Path(self.recipe.model.path).name}/{stages}{pattern}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def papers() -> list[str]:
    """The papers that have a file here."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def tables(paper: str) -> dict[str, dict[str, Any]]:
    """A paper's tables by number, as its file has them. ValueError if there is no such file."""
    if paper not in papers():
        raise ValueError(f"no tables of `{paper}`, {suggest(paper, papers())}")
    return YAML(typ="safe", pure=True).load(HERE / f"{paper}.yaml")["tables"]


def table(paper: str, number: str) -> dict[str, Any]:
    """One table. ValueError if the paper has no such table here."""
    found = tables(paper)
    if number not in found:
        raise ValueError(f"{paper} has no table `{number}`, {suggest(number, found)}")
    return found[number]


def rows(paper: str, number: str, model: str | None = None, settings: Sequence[str] = ()) -> list[Row]:
    """A table's rows for a model, by default the table's first; settings are overrides that come after the row's own.

    A folder counts as the paper's model if its name is the same: `copies/opt-125m` for facebook/opt-125m.

    Raises:
        RecipeError: what is wrong with the first row that cannot be run.
    """
    described = table(paper, number)
    model = model or described["models"][0]["name"]
    last = Path(model).name.lower()
    index = next((i for i, m in enumerate(described["models"]) if Path(m["name"]).name.lower() == last), None)
    found = []
    for row in described["rows"]:
        known = row["paper"][index] if index is not None else None
        for swept, entry in _swept(described.get("sweep"), row, known):
            overrides = [f"model={model}", *described.get("set", [])]
            if index is not None:
                length = described["models"][index]["length"]
                overrides += [f"calibration.length={length}", f"evaluate.length={length}"]
            overrides += [f"pattern={row['pattern']}"] if "pattern" in row else []
            overrides += [*row.get("set", []), *swept, *settings]
            recipe = load_recipe(HERE / paper / f"{row['recipe']}.yaml", overrides)
            if problems := check_options(recipe):
                raise RecipeError(problems)
            shown = swept[0].partition("=")[2] if swept else ""
            figures = _figures(described["figures"], entry)
            found.append(Row(row["method"], row.get("pattern", ""), shown, row.get("dense", False), recipe, figures))
    return found


def choose(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows whose label has one of these texts in it; all if none is given. ValueError if a text is in no label."""
    for text in wanted:
        if not any(text.lower() in row.label.lower() for row in rows):
            raise ValueError(f"no row has `{text}` in its name; there are {', '.join(row.label for row in rows)}")
    return [row for row in rows if not wanted or any(text.lower() in row.label.lower() for text in wanted)]


def _swept(sweep: Mapping[str, Any] | None, row: Mapping[str, Any], known: Any) -> Iterator[tuple[list[str], Any]]:
    if sweep is None or row.get("dense"):
        yield [], known
        return
    for value in sweep["values"]:
        yield [f"{sweep['key']}={value}"], (known or {}).get(value)


def _figures(names: Sequence[str], entry: Any) -> dict[str, float]:
    if entry is None:
        return {}
    figures = zip(names, entry if isinstance(entry, list) else [entry], strict=True)
    return {name: figure for name, figure in figures if figure is not None}
