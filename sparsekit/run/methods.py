"""Methods as a recipe names them: functions with their options filled in, and their time counted."""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from torch import Tensor

from sparsekit import registry
from sparsekit.contracts import needs_gram
from sparsekit.maths import Norms, Stats
from sparsekit.recipe import TARGETS, Stage
from sparsekit.system import Meter


def timed(name: str, solver: Callable[..., Tensor], meter: Meter) -> Callable[..., Tensor]:
    """The same solver, its time and memory counted to `name`."""

    @wraps(solver)  # so that its signature, which says whether it takes a warm start, stays visible
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with meter.stage(name):
            return solver(*args, **kwargs)

    return run


def configured(group: str, stage: Stage) -> Callable[..., Any]:
    """The function that a stage names, with its options filled in."""
    own = {name: value for name, value in stage.options.items() if group != "solvers" or name != TARGETS}
    return partial(registry.load(group, stage.name), **underscored(own))


def statistics_for(solvers: Iterable[Stage]) -> type[Norms]:
    """What a chain of solvers must know of a linear's inputs."""
    needed = any(needs_gram(registry.load("solvers", stage.name)) for stage in solvers)
    return Stats if needed else Norms


def underscored(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names that their function has for them."""
    return {registry.normal(name): value for name, value in options.items()}
