"""The second look at a recipe: options of the methods that it names, and the order of its stages.

Imports the modules of these methods (and with them, as a rule, torch). Every problem is found, each with its line.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.contracts import Effect
from sparsekit.recipe.chains import TARGETS, order_problems, targets_problem
from sparsekit.recipe.effects import effect_of, kind
from sparsekit.recipe.methods import Stage
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.writing import named_methods
from sparsekit.recipe.yaml_tree import Tree


class RecipeError(ValueError):
    """Everything that is wrong with a recipe: `problems`, one sentence each with its place, in the file's order."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = sorted(problems, key=_order)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the recipe\n  "
        super().__init__(head + "\n  ".join(self.problems))


def _order(problem: str) -> tuple[bool, int]:
    line = re.match(r"[^\n]*?:(\d+): ", problem)
    return problem.startswith("--set "), int(line[1]) if line else 0


def without_pattern(tree: Tree, name: str) -> str:
    """What is said where the pattern is missing that a stage prunes to."""
    return f'{tree.place(())}: missing key `pattern`, which `{name}` prunes to: give one such as "50%" or "2:4"'


def check_options(recipe: Recipe) -> list[str]:
    """Problems of the options of the named methods, alone and together, and of what stages do to one another.

    A method that cannot be imported is a problem too.
    """
    problems: list[str] = []
    for keys, where, group, stage, fields in named_methods(recipe):
        try:
            function = registry.load(group, stage.name)
        except ValueError as error:
            problems.append(f"{recipe._tree.place(keys)}: {where}: {error}")
            continue
        options = stage.options
        if group == "solvers":
            place, number = recipe._tree.place((*keys, TARGETS)), int(keys[1])
            if said := targets_problem(stage, recipe.stages[number - 1] if number else None):
                problems.append(f"{place}: {where}: {said}")
            options = {name: value for name, value in options.items() if name != TARGETS}
        given = options | {k: v for k, v in fields.items() if k in registry.options(function)}
        wrong = registry.option_problems(function, given, also=fields)
        problems += [f"{recipe._tree.place((*keys, name))}: {where}: {problem}" for name, problem in wrong.items()]
        if not wrong:
            together = _together(function, given)
            problems += [f"{recipe._tree.place(keys)}: {where}: {problem}" for problem in together]
    return problems or _between_stages(recipe)


def _together(function: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """What a method's own `check`, if it declares one, says of all its options together."""
    options = {name: p.default for name, p in registry.options(function).items()}
    options |= {registry.normal(name): value for name, value in given.items()}
    try:
        getattr(function, "check", lambda _: None)(options)
    except ValueError as error:
        return [str(error)]
    return []


def _between_stages(recipe: Recipe) -> list[str]:
    """Where a stage would lose what an earlier one did, by their declared effects."""
    places = [f"{recipe._tree.place(('stages', i))}: stage {i + 1}, `{s.name}`" for i, s in enumerate(recipe.stages)]
    effects, problems = [], []
    for place, stage in zip(places, recipe.stages, strict=True):
        try:
            effects.append(effect_of(stage))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        return problems
    pruning = [stage.name for stage, effect in zip(recipe.stages, effects, strict=True) if effect.prunes]
    if recipe.pattern is None and pruning:
        problems.append(without_pattern(recipe._tree, pruning[0]))
    if recipe.pattern is not None and not pruning and recipe.from_ is None:
        problems.append(
            f"{recipe._tree.place(('pattern',))}: `pattern` is {recipe.pattern}, and no stage prunes weights to it: "
            "remove it, or add a stage that does"
        )
    if isinstance(recipe.pattern, dict) and recipe.allocation.name != "uniform":
        problems.append(
            f"{recipe._tree.place(('allocation',))}: `allocation` is {recipe.allocation.name}, which spreads one share "
            "over all linears, and `pattern` gives each target its own: leave out one of the two"
        )
    asked = recipe.error_correction
    problems += [
        f"{place}, works with error_correction {' or '.join(effect.corrections)}, and the recipe's is {asked}: choose "
        f"{effect.corrections[0]}, or another stage"
        for place, effect in zip(places, effects, strict=True)
        if effect.corrections and asked not in effect.corrections
    ]
    pruned = recipe.from_ is not None and (Path(recipe.from_) / "masks.safetensors").is_file()
    return problems + _lost(recipe.stages, effects, places, f"from: {recipe.from_}" if pruned else "")


def _lost(stages: Sequence[Stage], effects: Sequence[Effect], places: Sequence[str], earlier: str) -> list[str]:
    """earlier: what pruned weights before the first stage."""
    problems: list[str] = []
    quantized = resized = ""
    last = len(stages) - 1
    for number, (stage, effect, place) in enumerate(zip(stages, effects, places, strict=True)):
        if resized:
            problems.append(f"{place}, comes after `{resized}`, which changed the width between blocks: put it before")
        if kind(stage) == "solver":
            problems += order_problems([stage], [place], earlier)
        elif earlier and effect.cuts:
            problems.append(f"{place}, removes structures, which must come before `{earlier}`: move it there")
        elif earlier and effect.resizes:
            problems.append(f"{place}, changes the width between blocks, which must come before `{earlier}`")
        elif earlier and effect.start == "dense":
            problems.append(f"{place}, prunes the dense model, so `{earlier}` before it would be lost: remove it")
        elif not earlier and effect.start == "answer":
            problems.append(f"{place}, only improves the answer of an earlier stage: put one, such as wanda, before it")
        if quantized and effect.grid is None and (effect.moves or effect.prunes):
            problems.append(f"{place}, moves weights off the grid that `{quantized}` put them on: quantize last")
        if effect.unmerged and number < last:
            problems.append(
                f"{place}, has merge: false, but later stages would change the model that its update belongs to: merge "
                "it, or make it the last stage"
            )
        quantized = stage.name if effect.grid is not None else quantized
        resized = stage.name if effect.resizes else resized
        if effect.prunes or (earlier and effect.moves and not effect.cuts and not effect.resizes):
            earlier = stage.name  # what comes after starts from what it leaves; of a model that nobody pruned, weights
    return problems
