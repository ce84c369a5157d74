"""Heat maps as tables: a row for each block, a column for each linear, the figure in the cell."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sparsekit.results.page.templating import chart

BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$")  # "model.layers.3.self_attn.q_proj": its block, its name inside
HIGH = 0.66  # from this depth of colour on, the figure is in the other ink: contrast is 4.5 or more in both schemes


def by_block(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{block: {linear: value}} of {full name: value}, in order; linears by their last name where that is enough."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        match = BLOCK.match(name)
        block, inside = match.groups() if match else ("", name)
        found.setdefault(block, {})[inside] = value
    insides = list(dict.fromkeys(inside for row in found.values() for inside in row))
    last = [inside.rpartition(".")[2] for inside in insides]
    short = {inside: end if last.count(end) == 1 else inside for inside, end in zip(insides, last, strict=True)}
    return {block: {short[inside]: value for inside, value in row.items()} for block, row in found.items()}


def heat(title: str, kind: str, values: Mapping[str, float], *, top: float | None = None) -> str:
    """A heat map of shares, such as sparsities, shown in percent; nothing where there are no values.

    kind: the class of its colour, "sparsity" or "error". top: the scale goes from 0 to it, evenly; None: from the least
    value to the largest, logarithmic.
    """
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    grid = by_block(values)
    columns = list(dict.fromkeys(column for row in grid.values() for column in row))
    low, high = (0.0, top) if top else (min(values.values()), max(values.values()))
    depth = _evenly(high) if top else _logarithmic(low, high)
    rows = [
        (block, [_cell(block, column, row.get(column), depth) for column in columns]) for block, row in grid.items()
    ]
    return chart(
        "heat",
        title=title,
        kind=kind,
        low=percent(low),
        high=percent(high),
        logarithmic=not top,
        columns=columns,
        rows=rows,
    )


class Cell(NamedTuple):
    """A linear in a heat map: its figure, how deep its colour is (0 to 1), and what a resting pointer reads."""

    text: str
    depth: float
    deep: bool
    tip: str


def _cell(block: str, column: str, value: float | None, depth: Callable[[float], float]) -> Cell | None:
    if value is None:
        return None
    deep = depth(value)
    return Cell(percent(value), deep, deep > HIGH, f"{block}.{column}: {value:.4%}")


def _evenly(high: float) -> Callable[[float], float]:
    return lambda value: min(max(value / high, 0), 1)


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    floor = max(low, high * 1e-6, 1e-12)  # an error of 0 is the end of the scale, not minus infinity
    width = math.log(high / floor) if high > floor else 0
    return lambda value: math.log(max(value, floor) / floor) / width if width else 0.0


def percent(share: float) -> str:
    """A share in percent, without the sign, in at most four signs: 0.4963 -> 49.6, 0.0213 -> 2.1, 0.0008 -> 0.08."""
    value = 100 * share
    if value >= 99.95 or value == 0:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 0.95 else 2}f}"
