"""What a layer-wise solver says that it needs."""

import inspect
from collections.abc import Callable
from typing import Any


def needs_gram(solver: Callable[..., Any]) -> bool:
    """Whether a solver needs the Gram matrix of its inputs: not where its parameter `stats` is declared a `Norms`."""
    stats = inspect.signature(solver).parameters.get("stats")
    declared = inspect.Parameter.empty if stats is None else stats.annotation
    return str(getattr(declared, "__name__", declared)).rpartition(".")[2] != "Norms"


def held(solver: Callable[..., Any], out: int, width: int) -> int:
    """Bytes that a solver holds at once, beside weight (out, width) and statistics, by its attribute `memory`.

    The attribute is (weights, grams), float32 matrices of the weight's size and of the Gram's, or a function of out and
    width that gives float32 numbers. Of a solver that does not say it: more than any here needs.
    """
    told = getattr(solver, "memory", (20, 4))
    count = told(out, width) if callable(told) else told[0] * out * width + told[1] * width**2
    return int(4 * count)
