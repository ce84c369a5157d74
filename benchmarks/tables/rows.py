"""The rows of a paper's table as recipes: what the files beside this one say, for one model."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sparsekit.recipe import Recipe, RecipeError, check_options, load_recipe, resolved
from sparsekit.registry import normal, suggest

HERE = Path(__file__).parent
OPTION = re.compile(r"stages\.(\d+)\.([\w-]+)\.")  # how a setting of a method's option begins


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
        return _label(self.method, self.pattern, self.swept)

    @property
    def folder(self) -> str:
        """A name that changes with anything that may change the figures, so that equal runs of two tables are one."""
        plain = resolved(self.recipe)
        keys = ("model", "evaluate") if self.dense else plain.keys() - {"output", "memory", "keep"}
        text = json.dumps({key: plain[key] for key in sorted(keys)}, sort_keys=True)
        stages = "dense" if self.dense else "-".join(stage.name for stage in self.recipe.stages)
        pattern = "" if self.dense or self.recipe.pattern is None else f"-{self.recipe.pattern}"
        pattern = pattern.replace("%", "").replace(":", "of")
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


def rows(
    paper: str, number: str, model: str | None = None, settings: Sequence[str] = (), wanted: Sequence[str] = ()
) -> list[Row]:
    """A table's rows for a model, by default the table's first; settings are overrides that come after the row's own.

    wanted: only rows whose label has one of these texts in it; none: all

    A folder counts as the paper's model if its name is the same: `copies/opt-125m` for facebook/opt-125m. A setting of
    a method's options, such as `stages.0.wanda-sp.shape=free`, holds for the rows that have that method there.

    Raises:
        RecipeError: what is wrong with the first row that cannot be run.
        ValueError: a setting of a method that no row has there, a text that is in no label.
    """
    described = table(paper, number)
    model = model or described["models"][0]["name"]
    last = Path(model).name.lower()
    index = next((i for i, m in enumerate(described["models"]) if Path(m["name"]).name.lower() == last), None)
    found, labels = [], []
    unused = {setting for setting in settings if OPTION.match(setting)}
    for row in described["rows"]:
        known = row["paper"][index] if index is not None else None
        for value, entry in _swept(described.get("sweep"), row, known):
            labels.append(_label(row["method"], row.get("pattern", ""), value))
            if wanted and not any(text.lower() in labels[-1].lower() for text in wanted):
                continue  # it may need a plugin that is not installed
            overrides = [f"model={model}", "bos=published", *described.get("set", [])]
            if index is not None and "length" in described["models"][index]:
                length = described["models"][index]["length"]
                overrides += [f"calibration.length={length}", f"evaluate.length={length}"]
            overrides += [f"pattern={row['pattern']}"] if "pattern" in row else []
            overrides += _with(value, described.get("sweep"), row.get("set", []))
            file = HERE / paper / f"{row['recipe']}.yaml"
            fitting = _fitting(file, overrides, settings)
            recipe = load_recipe(file, [*overrides, *fitting])
            unused -= set(fitting)
            if problems := check_options(recipe):
                raise RecipeError(problems)
            figures = _figures(described["figures"], entry)
            found.append(Row(row["method"], row.get("pattern", ""), value, row.get("dense", False), recipe, figures))
    for text in wanted:
        if not any(text.lower() in label.lower() for label in labels):
            raise ValueError(f"no row has `{text}` in its name; there are {', '.join(labels)}")
    if unused:
        raise ValueError(f"no row has the method that {sorted(unused)[0]} sets an option of")
    return found


def _label(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _fitting(file: Path, overrides: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The settings without those of options of methods that this row does not have in that place."""
    plain = [setting for setting in settings if not OPTION.match(setting)]
    if len(plain) == len(settings):
        return plain
    stages = enumerate(load_recipe(file, [*overrides, *plain]).stages)
    there = {(str(index), normal(stage.name)) for index, stage in stages}
    matches = {setting: OPTION.match(setting) for setting in settings}
    return [s for s, match in matches.items() if not match or (match[1], normal(match[2])) in there]


def _swept(sweep: Mapping[str, Any] | None, row: Mapping[str, Any], known: Any) -> Iterator[tuple[str, Any]]:
    if sweep is None or row.get("dense"):
        yield "", known
        return
    for value in row.get("values", sweep["values"]):
        yield str(value), (known or {}).get(value)


def _with(value: str, sweep: Mapping[str, Any] | None, settings: Sequence[str]) -> list[str]:
    """A row's settings at a swept value, which stands where they have a `$`, or else is that of the sweep's key."""
    filled = [setting.replace("$", value) for setting in settings]
    return filled if not value or sweep is None or filled != list(settings) else [*filled, f"{sweep['key']}={value}"]


def _figures(names: Sequence[str], entry: Any) -> dict[str, float]:
    if entry is None:
        return {}
    figures = zip(names, entry if isinstance(entry, list) else [entry], strict=True)
    return {name: figure for name, figure in figures if figure is not None}
