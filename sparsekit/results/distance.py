"""How far apart the masks of two runs are: the normalised Hamming distance, and that of random masks beside it."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from safetensors import SafetensorError, safe_open

from sparsekit.model.structure import COUNTED, STRUCTURE_FILE, Shape
from sparsekit.results.comparison import Run
from sparsekit.results.folder import MASKS, REPORT
from sparsekit.results.report import read_report

ONES = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1).sum(1, dtype=numpy.uint8)  # of a byte
NAMED = 4  # pairs of runs in a note
NOTE = (
    "masks: the share of units that one of two runs keeps and the other does not (normalised Hamming distance); "
    "in brackets: two random masks that keep as many of each layer, or linear"
)


class Gap(NamedTuple):
    """Two masks over the same units. differ: units that one keeps and the other does not; random: how many that would
    be, in expectation, of two random masks that keep as many each; units: how many there are."""

    differ: int
    random: float
    units: int

    @classmethod
    def of(cls, differ: int, one: int, two: int, units: int) -> "Gap":
        """Of masks that keep `one` and `two` of the units."""
        return cls(differ, (one * (units - two) + two * (units - one)) / units if units else 0.0, units)


def distances(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The normalised Hamming distance between the masks of every two runs that both removed units, or both weights.

    Units are numbered as in the source model; those of a layer that is gone are gone. Masks of weights are read linear
    by linear, and compared only where both models have the same units. Source: *Bypass Back-propagation*, A.14.

    Returns [{"runs": [path, path], "masks": {kind: {"distance", "random", "units", "each"}}}], or "why" where there is
    no distance; kind is heads (KV groups), channels, layers or weights, and what neither of the two removed is absent.
    distance and random are shares of the units, `each` has both for every layer of the source, or linear, by name.

    Raises:
        ValueError: a run's structure.json or masks.safetensors is damaged.
    """
    shapes = {run.path: Shape.read(Path(run.path) / "model") for run in runs if _cut(run)}
    sources = {run.path: _source(run) for run in runs}
    found, waiting = [], []
    for one, two in combinations(runs, 2):
        cut, pruned = (all(map(has, (one, two))) for has in (_cut, _pruned))
        if not cut and not pruned:
            continue
        entry: dict[str, Any] = {"runs": [one.path, two.path]}
        found.append(entry)
        if why := _other(sources[one.path], sources[two.path]):
            entry["why"] = why
            continue
        first, second = shapes.get(one.path), shapes.get(two.path)
        if any(_cut(run) and shapes[run.path] is None for run in (one, two)):
            entry["why"] = f"model/{STRUCTURE_FILE} is missing"
            continue
        if first and second:
            entry["masks"] = {kind: _told(gaps) for kind, gaps in _units(first, second, _layers(one, two)).items()}
        if not pruned:
            continue
        if (first and first.layers) != (second and second.layers):
            entry.setdefault("why", "other units are left")
        elif any(not (Path(run.path) / MASKS).is_file() for run in (one, two)):
            entry["why"] = f"{MASKS} is missing"
        else:
            waiting.append((one, two, entry))
    for (_, _, entry), gaps in zip(waiting, _weights([(one, two) for one, two, _ in waiting]), strict=True):
        if gaps:
            entry["masks"] = entry.get("masks", {}) | {"weights": _told(gaps)}
        else:
            entry.setdefault("why", "other linears were pruned")
    return found


def _cut(run: Run) -> bool:
    return "structure" in run.report


def _pruned(run: Run) -> bool:
    return bool(run.report["sparsity"]["per_linear"])


def _source(run: Run) -> tuple[str, str | None]:
    """The name of the model that was never pruned, and the digest of its weights where the reports tell it."""
    report, seen = run.report, set()
    while earlier := report["recipe"].get("from"):
        file = Path(earlier) / REPORT
        if file in seen or not file.is_file():
            return run.report["model"]["name"], None
        seen.add(file)
        report = read_report(file.parent)
    return run.report["model"]["name"], report.get("fingerprint", {}).get("model")


def _other(one: tuple[str, str | None], two: tuple[str, str | None]) -> str:
    """Why two source models are not the same; empty where they are."""
    same = one[1] == two[1] if one[1] and two[1] else one[0] == two[0]
    if same:
        return ""
    return "other source models" if one[0] != two[0] else "source models of one name with other weights"


def _layers(one: Run, two: Run) -> int:
    """How many layers the source has, as far as the reports tell."""
    told = [run.report["structure"] for run in (one, two)]
    return max(max(each.get("source_layers", 0), *(index + 1 for index in each["layers"])) for each in told)


def _units(one: Shape, two: Shape, layers: int) -> dict[str, dict[str, Gap]]:
    """The gaps by layer of every kind of which one of the two lost some; those of `layers` have one name, "all"."""
    found: dict[str, dict[str, Gap]] = {}
    left = [{layer.index: layer for layer in shape.layers} for shape in (one, two)]
    for kind in COUNTED:
        counts = [
            {index: count for index, layer in each.items() if (count := getattr(layer, kind)) is not None}
            for each in left
        ]
        every = [count for each in counts for count in each.values()]
        if any(count.kept < count.of for count in every):
            found[kind] = {}
            for index in range(layers):
                both = [set(each[index].units) if index in each else set() for each in counts]
                width = next((each[index].of for each in counts if index in each), every[0].of)
                found[kind][str(index)] = Gap.of(len(both[0] ^ both[1]), len(both[0]), len(both[1]), width)
    if any(len(each) < layers for each in left):
        differ = len(left[0].keys() ^ left[1].keys())
        found["layers"] = {"all": Gap.of(differ, len(left[0]), len(left[1]), layers)}
    return found


def _weights(pairs: Sequence[tuple[Run, Run]]) -> list[dict[str, Gap]]:
    """The gaps by linear of every pair, of the linears that both pruned; all masks of one linear are in memory."""
    found: list[dict[str, Gap]] = [{} for _ in pairs]
    runs = {run.path: run.report["sparsity"]["per_linear"] for pair in pairs for run in pair}
    names = dict.fromkeys(name for linears in runs.values() for name in linears)
    with ExitStack() as stack:
        try:
            files = {run: stack.enter_context(safe_open(Path(run) / MASKS, framework="numpy")) for run in runs}
            for name in names:
                masks = {run: file.get_tensor(name) for run, file in files.items() if name in runs[run]}
                kept = {run: int(ONES[bits].sum(dtype=numpy.int64)) for run, bits in masks.items()}
                for gaps, pair in zip(found, pairs, strict=True):
                    one, two = (run.path for run in pair)
                    if one in masks and two in masks and masks[one].size == masks[two].size:
                        # the last byte's spare bits are zero in both
                        differ = int(ONES[masks[one] ^ masks[two]].sum(dtype=numpy.int64))
                        gaps[name] = Gap.of(differ, kept[one], kept[two], runs[one][name]["parameters"])
        except SafetensorError as error:
            raise ValueError(f"{MASKS} of {' or '.join(runs)} is damaged: {error}") from error
    return found


def _told(gaps: dict[str, Gap]) -> dict[str, Any]:
    """JSON: what is said of a kind."""
    units = sum(gap.units for gap in gaps.values()) or 1
    distance, random = (sum(gap[place] for gap in gaps.values()) / units for place in (0, 1))
    each = {name: [gap.differ / gap.units, gap.random / gap.units] for name, gap in gaps.items() if gap.units}
    return {"distance": distance, "random": random, "units": units, "each": each if len(each) > 1 else {}}


def cells(found: Sequence[dict[str, Any]], names: dict[str, str]) -> list[list[str]]:
    """The distances as text: a line of headings, and a line for every two runs that have one.

    names: what the runs are called, by their paths.
    """
    far = [each for each in found if "masks" in each]
    kinds = [kind for kind in (*COUNTED, "layers", "weights") if any(kind in each["masks"] for each in far)]
    lines = [["masks of", *kinds]] if far else []
    for each in far:
        told = [each["masks"].get(kind) for kind in kinds]
        values = [f"{one['distance']:.2%} ({one['random']:.2%})" if one else "" for one in told]
        lines.append([_pair(each, names), *values])
    return lines


def notes(found: Sequence[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """What the figures are, and which runs have no distance, and why."""
    reasons: dict[str, list[str]] = {}
    for each in found:
        if "why" in each:
            reasons.setdefault(each["why"], []).append(_pair(each, names))
    said = [NOTE] if any("masks" in each for each in found) else []
    for why, pairs in reasons.items():
        more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
        said.append(f"no distance between masks: {why} ({'; '.join(pairs[:NAMED])}{more})")
    return said


def _pair(entry: dict[str, Any], names: dict[str, str]) -> str:
    return ", ".join(names[run] for run in entry["runs"])
