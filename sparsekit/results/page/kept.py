"""Which layers of the source lost most: what each keeps of its heads, channels and parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.results.page.charts import columns
from sparsekit.results.page.heat import percent
from sparsekit.results.page.templating import section

KINDS = {
    "parameters": "Parameters",
    "heads": "Heads (KV groups)",
    "channels": "MLP channels",
    "mamba": "Mamba channels or heads",
    "experts": "Experts",
}
NAMED = 6  # layers; of more, their number is told


def structure(report: Mapping[str, Any]) -> str:
    """A chart for each kind of unit that was removed, and of all parameters: the share that every layer keeps."""
    found = report.get("structure") or {}
    left = dict(zip(found.get("layers", []), found.get("blocks", []), strict=True))
    if not left:
        return ""
    layers = max(found.get("source_layers", 0), *(layer + 1 for layer in left))
    charts = []
    for kind, title in KINDS.items():
        counts = {layer: units[kind] for layer, units in left.items() if units.get(kind)}
        if kind == "parameters" and not counts and len(left) < layers:  # an older report: layers alone
            title, counts = "Layers", dict.fromkeys(left, (1, 1))
        if kind != "parameters" and all(kept == of for kept, of in counts.values()):
            continue
        if counts:
            typical = max(of for _, of in counts.values())
            charts.append(_chart(title, [_count(layer, left, counts, typical) for layer in range(layers)]))
    return section("kept", charts=charts) if charts else ""


def _count(
    layer: int, left: Mapping[int, Any], counts: Mapping[int, Sequence[int]], typical: int
) -> tuple[int, int] | None:
    """(kept, of) of a layer, nothing kept where it is gone; None: not known."""
    if layer not in left:
        return 0, typical
    return (counts[layer][0], counts[layer][1]) if layer in counts else None


def _chart(title: str, counts: Sequence[tuple[int, int] | None]) -> str:
    told = [f"{count[0]:,} of {count[1]:,}" if count else "not known" for count in counts]
    shares = [min(count[0] / count[1], 1.0) if count else None for count in counts]
    kept, of = (sum(count[place] for count in counts if count) for place in (0, 1))
    said = f"{kept:,} of {of:,} ({_share(kept / of)}). {lost(shares)}"
    return columns(f"{title}, % kept of each layer", shares, told, mean=min(kept / of, 1.0), said=said)


def lost(shares: Sequence[float | None]) -> str:
    """Which layers lost most, and which least, in sentences. shares: kept, by layer."""
    known = {layer: round(1 - share, 3) for layer, share in enumerate(shares) if share is not None}
    gone = [layer for layer, part in known.items() if part == 1]
    some = {layer: part for layer, part in known.items() if part < 1}
    said = [f"Gone in {_layers(gone)}."] if gone else []
    most, least = (pick(some.values(), default=0.0) for pick in (max, min))
    if some and most - least < 0.005:
        said.append(f"{'The others' if gone else 'All'} lost {_share(most) if most else 'nothing'}.")
    elif some:
        for what, part in (("Most", most), ("Least", least)):
            which = [layer for layer, other in some.items() if other == part]
            said.append(f"{what} lost in {_layers(which)}: {_share(part)}.")
    return " ".join(said)


def _layers(which: Sequence[int]) -> str:
    if len(which) > NAMED:
        return f"{len(which)} layers"
    return f"layer{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}"


def _share(part: float) -> str:
    return f"{percent(part)}\N{NO-BREAK SPACE}%"
