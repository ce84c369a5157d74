"""A recipe: the YAML file that says what to do, checked in full before anything heavy is imported.

Two steps. `load_recipe` checks structure, types and names without importing torch or any method. `check_options` then
imports the named methods alone and checks their options. Both report every problem at once, each with its line.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsekit.recipe import yaml_tree as yamltree
from sparsekit.recipe.checks import RecipeError, without_pattern
from sparsekit.recipe.effects import kind
from sparsekit.recipe.methods import expand
from sparsekit.recipe.schema import Recipe, sentence
from sparsekit.recipe.yaml_tree import Tree


def load_recipe(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; overrides are "dotted.key=value". Relative paths in it are from the current directory.

    given: its file, or what a file would hold

    Raises RecipeError with all problems of structure, types and names. Imports neither torch nor any method.
    """
    tree = _tree(given, overrides)
    if isinstance(tree.value.get("pattern"), list):
        raise RecipeError(
            [
                f"{tree.place(('pattern',))}: `pattern` is a list, and each entry of it is a run of its own: "
                "`sparsekit fit` runs them one after another, and sparsekit.fit_each from Python"
            ]
        )
    return _recipe(tree, given)


def load_recipes(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes of a file, by their patterns: where `pattern` is a list, one for each entry, else one, called "".

    Each of several writes into a folder of its own in the `output` of the file. given, overrides: as in `load_recipe`

    Raises RecipeError as `load_recipe` does, and for a list that is empty or names a pattern twice.
    """
    tree = _tree(given, overrides)
    patterns = tree.value.get("pattern")
    if not isinstance(patterns, list):
        return {"": _recipe(tree, given)}
    names = [_named(each) for each in patterns]
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        said = "is an empty list, give a pattern or several" if twice is None else f"has {twice} twice"
        raise RecipeError([f"{tree.place(('pattern',))}: `pattern` {said}"])
    found = {}
    for name, pattern in zip(names, patterns, strict=True):
        recipe = _recipe(replace(tree, value=tree.value | {"pattern": pattern}), given)
        folder = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
        found[name] = recipe.model_copy(update={"output": f"{recipe.output}/{folder}"})
        found[name]._tree = recipe._tree
    return found


def _named(pattern: Any) -> str:
    """What a pattern is called: 0.5 is 50%, a mapping its keys and values."""
    if isinstance(pattern, Mapping):
        return ", ".join(f"{target} {of}" for target, of in pattern.items())
    return f"{pattern:.4%}".rstrip("0%").rstrip(".") + "%" if isinstance(pattern, float) else str(pattern)


def _tree(given: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    tree = Tree("the recipe", dict(given)) if isinstance(given, Mapping) else yamltree.read(given)
    if tree.value is None:
        raise RecipeError(tree.problems)
    for setting in overrides:
        yamltree.override(tree, setting, expand)
    if not isinstance(tree.value, dict):
        raise RecipeError([*tree.problems, f"{tree.place(())}: a recipe is a mapping with {', '.join(_required())}"])
    _model_of_run(tree.value)
    return tree


def _recipe(tree: Tree, given: str | Path | Mapping[str, Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree.value)
    except ValidationError as error:
        raise RecipeError(tree.problems + [sentence(each, tree) for each in error.errors()]) from None
    if tree.problems:
        raise RecipeError(tree.problems)
    solvers_ = [stage.name for stage in recipe.stages if kind(stage) == "solver"]
    if recipe.pattern is None and solvers_:
        raise RecipeError([without_pattern(tree, solvers_[0])])
    stages = [replace(s, line=_line(tree.place(("stages", i)))) for i, s in enumerate(recipe.stages)]
    allocation = replace(recipe.allocation, line=_line(tree.place(("allocation",))))
    name = "recipe" if isinstance(given, Mapping) else Path(given).stem
    output = recipe.output or f"runs/{name}"
    recipe = recipe.model_copy(update={"stages": stages, "allocation": allocation, "output": output})
    recipe._tree = tree
    return recipe


def _model_of_run(value: dict[str, Any]) -> None:
    """`from` says the model too, the one that its run began with, and the pattern, unless they are given."""
    report = Path(str(value.get("from"))) / "report.json"
    if isinstance(value.get("from"), str) and report.is_file():
        try:
            earlier = json.loads(report.read_text(encoding="utf-8"))["recipe"]
            for key in ("model", "pattern"):
                value.setdefault(key, earlier[key])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RecipeError(
                [f"from: {report} is not what a run leaves ({type(error).__name__}); restore it"]
            ) from error


def _required() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if field.is_required()]


def _line(place: str) -> int | None:
    file, _, line = place.rpartition(":")
    return int(line) if file and not place.startswith("--set ") and line.isdecimal() else None
