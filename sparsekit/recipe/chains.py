"""Solvers that a stage takes as an option: a name, {name: options}, or a chain as a list of these."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from sparsekit import registry
from sparsekit.contracts import show
from sparsekit.recipe.methods import Stage, method


def named_solvers(given: Any) -> list[Stage]:
    """What an option names. ValueError for names that are not there and forms that it cannot have."""
    find = method("solvers")
    return [find(each) for each in (given if isinstance(given, list | tuple) and given else [given])]


def targets_of(stage: Stage) -> list[str] | None:
    """The linears that a solver of a walk is for, named like the recipe's `targets`; None: all."""
    named = stage.options.get(TARGETS)
    return [named] if isinstance(named, str) else named


def targets_problem(stage: Stage, earlier: Stage | None) -> str | None:
    """What is wrong with the targets of a solver, which comes after `earlier` in a recipe's stages; None: nothing."""
    from sparsekit.recipe.effects import effect_of, kind

    if TARGETS not in stage.options:
        return None
    named = targets_of(stage)
    if not (isinstance(named, list) and named and all(isinstance(each, str) for each in named)):
        return f"`{TARGETS}` is {show(named)}, must be a name, or a list of names, such as attention"
    if earlier is None or kind(earlier) != "solver":
        return f"`{TARGETS}` is for a solver that goes on with another's answer: use the recipe's own key `{TARGETS}`"
    if effect_of(stage).grid is not None:
        return f"`{TARGETS}`: a stage that quantizes takes all linears; use the recipe's own key `{TARGETS}`"
    return None


def grid_of(given: Any) -> Any:
    """The quantization grid that the last of these solvers leaves weights on; None if it leaves them on none."""
    from sparsekit.recipe.effects import effect_of

    return effect_of(named_solvers(given)[-1]).grid


def order_problems(stages: Sequence[Stage], places: Sequence[str], earlier: str = "") -> list[str]:
    """Where a solver cannot start from what is there. earlier: what pruned weights before the first of them."""
    problems = []
    for stage, place in zip(stages, places, strict=True):
        start = registry.start(registry.load("solvers", stage.name))
        if earlier and start == "none":
            problems.append(
                f"{place}, cannot start from the answer of `{earlier}`, which would be thrown away: remove `{earlier}` "
                "or put a solver after it that continues a chain (`sparsekit methods` shows which do)"
            )
        if not earlier and start == "required":
            problems.append(f"{place}, only improves the answer of an earlier stage: put one, such as wanda, before it")
        earlier = stage.name
    return problems


def _checked(given: Any) -> Any:
    stages = named_solvers(given)
    problems = [
        f"solver `{stage.name}`: {problem}"
        for stage in stages
        for problem in registry.option_problems(registry.load("solvers", stage.name), stage.options).values()
    ]
    problems += order_problems(stages, [f"solver `{stage.name}`" for stage in stages])
    if problems:
        raise ValueError("; ".join(problems))
    return given


TARGETS = "targets"  # an option that every solver of a walk has beside its own
SolverChain = Annotated[Any, AfterValidator(_checked)]  # the type of an option that names solvers
