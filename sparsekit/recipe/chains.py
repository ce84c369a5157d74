"""Solvers that a stage takes as an option: a name, {name: options}, or a chain as a list of these."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from sparsekit import registry
from sparsekit.recipe.schema import Stage, method


def named_solvers(given: Any) -> list[Stage]:
    """What an option names. ValueError for names that are not there and forms that it cannot have."""
    find = method("solvers")
    return [find(each) for each in (given if isinstance(given, list | tuple) and given else [given])]


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


SolverChain = Annotated[Any, AfterValidator(_checked)]  # the type of an option that names solvers
