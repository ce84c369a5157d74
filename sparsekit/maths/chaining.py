"""Chains: each solver starts from the answer of the one before, and all aim at the same dense weight."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sparsekit.maths.pattern import Pattern
from sparsekit.maths.statistics import Stats

Solver = Callable[..., Tensor]


def init_parameter(solver: Solver) -> inspect.Parameter | None:
    """The parameter `init` of a solver: None if it cannot start from an answer, without default if it must."""
    return inspect.signature(solver).parameters.get("init")


def rows_apart(solver: Solver, pattern: Pattern) -> bool:
    """Whether a solver's answer for a row of a weight (out, in) depends on that row alone, with its options.

    A solver says so by its attribute `rows_apart`, a function of the pattern and of the options that are given.

    >>> from sparsekit.maths import NM
    >>> rows_apart(lambda weight, stats, pattern: weight, NM(2, 4))
    False
    """
    options: dict[str, Any] = {}
    told = getattr(solver, "rows_apart", None)
    while told is None and (inner := getattr(solver, "__wrapped__", getattr(solver, "func", None))) is not None:
        options = getattr(solver, "keywords", {}) | options
        solver, told = inner, getattr(inner, "rows_apart", None)
    return told is not None and bool(told(pattern, options))


def chain(*solvers: Solver) -> Solver:
    """One solver out of several: `chain(wanda, partial(refit, damping=0.1))(weight, stats, pattern)`.

    The chain has a parameter `init` if its first solver has, so chains can be chained.
    Raises ValueError when nothing is given and when a later solver has no parameter `init`, as its answer would throw
    the earlier one away; and, when called, if the first needs an `init` and gets none, or has no use for one it gets.
    """
    if not solvers:
        raise ValueError("chain() needs at least one solver")
    for solver in solvers[1:]:
        _refuse_to_forget(solver)
    first = init_parameter(solvers[0])

    def chained(weight: Tensor, stats: Stats, pattern: Pattern, init: Tensor | None = None) -> Tensor:
        """Run every solver of the chain on the same dense weight, each from the answer before it."""
        if init is not None:
            _refuse_to_forget(solvers[0])
        elif first is not None and first.default is inspect.Parameter.empty:
            raise ValueError(
                f"{_name(solvers[0])} needs an earlier answer to start from, so it cannot begin a chain; "
                "put a solver before it or pass init"
            )
        for solver in solvers:
            init = solver(weight, stats, pattern) if init is None else solver(weight, stats, pattern, init=init)
        assert init is not None
        return init

    def apart(pattern: Pattern, options: Any) -> bool:
        return all(rows_apart(solver, pattern) for solver in solvers)

    chained.rows_apart = apart  # type: ignore[attr-defined]
    chained.__name__ = f"chain({', '.join(map(_name, solvers))})"
    own = [parameter for name, parameter in inspect.signature(chained).parameters.items() if name != "init"]
    chained.__signature__ = inspect.Signature(own + ([first] if first else []))  # type: ignore[attr-defined]
    return chained


def _refuse_to_forget(solver: Solver) -> None:
    if init_parameter(solver) is None:
        raise ValueError(
            f"{_name(solver)} has no parameter init, so its answer would throw the earlier one away; "
            "it can only begin a chain"
        )


def _name(solver: Solver) -> str:
    while isinstance(solver, partial):
        solver = solver.func
    return getattr(solver, "__name__", repr(solver))
