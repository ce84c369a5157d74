"""What a layer-wise solver says that it needs."""

import inspect
from collections.abc import Callable
from typing import Any


def needs_gram(solver: Callable[..., Any]) -> bool:
    """Whether a solver needs the Gram matrix of its inputs: not where its parameter `stats` is declared a `Norms`."""
    stats = inspect.signature(solver).parameters.get("stats")
    declared = inspect.Parameter.empty if stats is None else stats.annotation
    return str(getattr(declared, "__name__", declared)).rpartition(".")[2] != "Norms"


def matrices(solver: Callable[..., Any]) -> tuple[float, float]:
    """What a solver holds at once: float32 matrices of the weight's size, and of the Gram's; by its attribute `memory`.

    Of one that does not say it, more than any solver here needs.
    """
    weights, grams = getattr(solver, "memory", (20, 4))
    return float(weights), float(grams)
