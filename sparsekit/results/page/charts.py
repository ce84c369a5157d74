"""Charts without scripts: bars, lines and columns. SVG draws, HTML writes, so that text keeps its size at any width."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from sparsekit.results.page.templating import chart

POINTS = 400  # of a line; longer ones are drawn as means of neighbours
WIDTH, HEIGHT = 600, 200  # of a drawing, in its own units
LOG = 50  # from this quotient of largest to smallest on, an axis is logarithmic


class Bar(NamedTuple):
    """One bar: whose (dense, pruned), how much, the standard error where known, and the figure as text."""

    who: str
    value: float
    stderr: float | None
    text: str


def bars(title: str, groups: Mapping[str, tuple[str, Sequence[Bar]]], top: float | None = None) -> str:
    """Bars in groups on one scale from 0, as a table that reads well aloud.

    groups: {name: (remark, bars)}. top: where the scale ends, the largest value (or end of its range) unless told.
    """
    every = [bar for _, group in groups.values() for bar in group]
    top = top or max((bar.value + (bar.stderr or 0) for bar in every), default=0) or 1.0

    def placed(bar: Bar) -> tuple[Bar, float, tuple[float, float] | None]:
        if not bar.stderr:
            return bar, bar.value / top, None
        low, high = (min(max((bar.value + s * bar.stderr) / top, 0), 1) for s in (-1, 1))
        return bar, bar.value / top, (low, high)

    drawn = [(name, remark, [placed(bar) for bar in group]) for name, (remark, group) in groups.items()]
    return chart("bars", title=title, groups=drawn)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str) -> str:
    """Curves over a common x axis, logarithmic in y where values differ much; nothing where there is no finite point.

    series: {name: [(x, y), ...]}, at most four of them. x: what the axis counts.
    """
    drawn = {name: thin([p for p in points if all(map(math.isfinite, p))]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [point[0] for points in drawn.values() for point in points]
    ys = [point[1] for points in drawn.values() for point in points]
    log = min(ys) > 0 and max(ys) / min(ys) > LOG
    marks = _decades(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    scale = math.log10 if log else float
    low, high = scale(marks[0]), scale(marks[-1])
    left, right = min(xs), max(xs)

    def across(value: float) -> float:
        return WIDTH * (value - left) / ((right - left) or 1)

    def down(value: float) -> float:
        return HEIGHT * (1 - (scale(value) - low) / ((high - low) or 1))

    def path(points: Sequence[tuple[float, float]]) -> str:
        if len(points) == 1:  # a line needs two
            points = [(left, points[0][1]), (right if right > left else left + 1, points[0][1])]
        return " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)

    label = f"{title}: " + "; ".join(
        f"{name} from {number(points[0][1])} to {number(points[-1][1])}" for name, points in drawn.items()
    )
    return chart(
        "lines",
        title=title,
        label=label,
        marks=[(down(mark), number(mark)) for mark in marks],
        curves=[(name, path(points)) for name, points in drawn.items()],
        hits=_hits(drawn, across, x),
        ends=(number(left), number(right)),
        axis=x,
    )


def _hits(
    drawn: Mapping[str, Sequence[tuple[float, float]]], across: Callable[[float], float], x: str
) -> list[tuple[float, float, str]]:
    """Columns that together cover the chart, each at the points of one x: (left end, width, what is there)."""
    at: dict[float, list[str]] = {}
    for name, points in drawn.items():
        for place, value in points:
            at.setdefault(place, []).append(f"{name} {number(value)}")
    places = sorted(at)
    edges = [0.0, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), float(WIDTH)]
    return [
        (a, b - a, f"{x} {number(place)}: {', '.join(at[place])}")
        for place, a, b in zip(places, edges[:-1], edges[1:], strict=True)
    ]


def columns(title: str, shares: Sequence[float | None], told: Sequence[str], *, mean: float, said: str) -> str:
    """A column for each layer: below what it keeps, above in another colour what it lost, and a line at the mean.

    shares: kept, by layer, from 0 to 1; None: not known. told: by layer, what a pointer that rests on it reads.
    said: the chart in a sentence, below its title.
    """
    width = WIDTH / max(len(shares), 1)
    layers = [
        (index, index * width + width * 0.1, width * 0.8, HEIGHT * share, tip)
        for index, (share, tip) in enumerate(zip(shares, told, strict=True))
        if share is not None
    ]
    step = next(s for power in range(9) for n in (1, 2, 5) if (s := n * 10**power) * 8 >= len(shares))
    marks = [((index + 0.5) / len(shares), index) for index in range(0, len(shares), step)]
    return chart("columns", title=title, said=said, layers=layers, mean=HEIGHT * (1 - mean), marks=marks)


def scatter(
    title: str,
    points: Mapping[str, tuple[float, float]],
    *,
    x: str,
    y: str,
    less: tuple[bool, bool],
    show: Callable[[float], str] | None = None,
) -> str:
    """Named points, and a line through those that no other betters in both; y is logarithmic where values differ much.

    points: {name: (x, y)}; less: whether less is better in x, and in y; show: x as text
    """
    show = show or number
    xs, ys = [p[0] for p in points.values()], [p[1] for p in points.values()]
    log = min(ys) > 0 and max(ys) / min(ys) > 8
    scale = math.log10 if log else float
    (left, right), (low, high) = (_range(xs), _range([scale(value) for value in ys]))
    at = {n: ((a - left) / (right - left), (scale(b) - low) / (high - low)) for n, (a, b) in points.items()}
    best = sorted((name for name in points if _unbettered(name, points, less)), key=lambda name: points[name])
    path = " ".join(f"{WIDTH * at[name][0]:.1f},{HEIGHT * (1 - at[name][1]):.1f}" for name in best)
    dots: list[Dot] = []
    for name, (across, up) in sorted(at.items(), key=lambda item: -item[1][1]):
        a, b = points[name]
        near = sum(abs(across - dot.across) < 0.25 and dot.up - up < 0.07 for dot in dots)  # names would overlap
        tip = f"{name}: {y} {number(b)}, {x} {show(a)}"
        side = "left" if across > 0.6 else "right"
        dots.append(Dot(name, across, up, name in best, tip, side, 13 * near - 4))
    return chart(
        "scatter",
        title=title,
        label=f"{title}: " + "; ".join(f"{name} {number(b)} at {show(a)}" for name, (a, b) in points.items()),
        points=dots,
        path=path if len(best) > 1 else "",
        heights=[(100 * (scale(v) - low) / (high - low), number(v)) for v in sorted({min(ys), max(ys)})],
        ends=(show(min(xs)), show(max(xs))),
        axis=x,
    )


class Dot(NamedTuple):
    """A named point of `scatter`: where it is, as shares of the chart, and where its name stands."""

    name: str
    across: float
    up: float
    best: bool
    tip: str
    side: str
    top: int


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends, a little beyond the values."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _unbettered(name: str, points: Mapping[str, tuple[float, float]], less: tuple[bool, bool]) -> bool:
    signs = [1 if low else -1 for low in less]
    own = [sign * value for sign, value in zip(signs, points[name], strict=True)]
    for other, point in points.items():
        their = [sign * value for sign, value in zip(signs, point, strict=True)]
        if other != name and their != own and all(a <= b for a, b in zip(their, own, strict=True)):
            return False
    return True


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(a for a, _ in group), fmean(b for _, b in group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose low and high."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**power for power in range(first, last + 1)]


def number(value: float) -> str:
    """A figure for an axis or a tooltip: four digits that count."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"
