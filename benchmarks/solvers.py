"""Solvers as a command line names them: `wanda`, `wanda+refit`, `alps:damping=0.2,iterations=12`, or a recipe's."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sparsekit import registry
from sparsekit.maths import chain
from sparsekit.recipe import RecipeError, Stage, Tree, check_options, kind, load_recipe, override

STARTS = ("wanda", "sparsegpt")  # what a solver that only continues a chain is put after


def installed() -> list[str]:
    """Every installed solver: those that can begin alone, the others after each of STARTS."""
    found = []
    for name in registry.names("solvers"):
        alone = registry.start(registry.load("solvers", name)) != "required"
        found += [name] if alone else [f"{start}+{name}" for start in STARTS]
    return found


def from_text(text: str) -> Callable[..., Tensor]:
    """The solver behind `name:option=value,option=value+name...`, values as a recipe has them.

    Raises:
        ValueError: an unknown name or option, or a chain that cannot be.
    """
    stages = []
    for part in re.split(r"\+(?=\s*[A-Za-z])", text):  # 1e+6 is a number
        name, _, options = part.partition(":")
        settings = re.split(r",(?=\s*[\w-]+=)", options) if options else []  # not at a comma inside a list
        stages.append(Stage(name.strip(), mapping(settings)))
    return _chained(stages, f"solver `{text}`")


def from_recipe(file: str) -> Callable[..., Tensor]:
    """The chain of a recipe's solvers with its options; model, pattern and text of the recipe are not looked at.

    Raises:
        ValueError: the recipe is wrong, or it has stages that are no layer-wise solvers.
    """
    recipe = load_recipe(file)
    if problems := check_options(recipe):
        raise RecipeError(problems)
    others = [stage.name for stage in recipe.stages if kind(stage) == "stage"]
    if others:
        raise ValueError(f"{file} has the stage `{others[0]}`; only layer-wise solvers can be compared on layers")
    return _chained(recipe.stages, file)


def mapping(settings: Sequence[str]) -> dict[str, Any]:
    """["damping=0.2", "bracket=[0.1, 1]"] as a recipe's parser reads them. Raises ValueError where it cannot."""
    tree = Tree("the command line", {})
    for setting in settings:
        override(tree, setting.strip(), lambda keys, found, inner: found)
    if tree.problems:
        raise ValueError("; ".join(tree.problems).replace("--set ", ""))
    return tree.value


def value(text: str) -> Any:
    """A single value as a recipe's parser reads it: `c4` is a text, `{source: jsonl, path: x}` a mapping."""
    return mapping([f"value={text}"])["value"]


def _chained(stages: Sequence[Stage], where: str) -> Callable[..., Tensor]:
    functions = [registry.load("solvers", stage.name) for stage in stages]
    problems = [
        problem
        for stage, function in zip(stages, functions, strict=True)
        for problem in registry.check_options(function, stage.options, where)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    if registry.start(functions[0]) == "required":
        raise ValueError(f"{where}: {stages[0].name} only improves an earlier answer; write wanda+{stages[0].name}")
    return chain(
        *(
            partial(function, **{registry.normal(name): option for name, option in stage.options.items()})
            for stage, function in zip(stages, functions, strict=True)
        )
    )
