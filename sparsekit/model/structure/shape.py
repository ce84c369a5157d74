"""What a cut model looks like: which layers are left and how wide each is. Enough to build it without its weights."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model import rebuild
from sparsekit.model.discovery import find_blocks
from sparsekit.model.expert_forms import as_linears
from sparsekit.model.linears import Linear, is_linear
from sparsekit.model.structure.cutting import cut
from sparsekit.model.structure.finding import find_units
from sparsekit.model.structure.heads import BY_QUERY
from sparsekit.model.structure.origins import Cuts, Origin, dropped, trace
from sparsekit.model.structure.units import Units

STRUCTURE_FILE = "structure.json"
VERSION = 1
COUNTED = ("heads", "channels", "mamba", "experts")
PARTS = {"attention": "heads", "mlp": "channels"}  # whole parts -> the units that go with them
LAYERS = "@layers"  # stands for the lines of layers while the rest is written


@dataclass(frozen=True)
class Count:
    """Units of a kind in a layer. units: those that are left, by their numbers in the source; of: how many it has."""

    units: tuple[int, ...]
    of: int

    @property
    def kept(self) -> int:
        """How many are left; 0: the part is gone."""
        return len(self.units)


@dataclass(frozen=True)
class Layer:
    """A layer that is left.

    index: in the source model
    heads: KV groups, or query heads where there is no GQA, or one key for all; None: what does what is not known for
        this family
    channels: of the MLP; None as with heads
    mamba: channels of a Mamba, or heads, or groups of heads; None as with heads
    experts: None where there are none
    """

    index: int
    heads: Count | None = None
    channels: Count | None = None
    mamba: Count | None = None
    experts: Count | None = None


@dataclass(frozen=True)
class Shape:
    """A cut model's structure, as `structure.json` tells it.

    config: the family's, with the layers that are left, at the widths before they were cut; JSON
    biases: linears that have a bias, which by that config they have not
    changed: parameters whose values are not the source's
    parameters: how many; tied ones count once
    queries: whether heads are query heads that all share one key
    layout, load: how the folder is stored and what opens it (see `storage.save`); empty before it is stored
    """

    layers: tuple[Layer, ...]
    config: dict[str, Any]
    biases: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    parameters: int = 0
    queries: bool = False
    layout: str = ""
    load: str = ""

    @classmethod
    def of(
        cls, model: nn.Module, cuts: Cuts = (), before: "Shape | None" = None, *, changed: Iterable[str] = ()
    ) -> "Shape":
        """The shape of a model in memory, on which `cuts` were made.

        before: the shape of the model that `cuts` began with; None: nothing had been cut out of it
        changed: parameters that were changed after the cuts, by their names in the model

        Raises:
            ValueError: the model is not what is left by these cuts, or cannot be built from its config and the counts.
        """
        with as_linears(model):
            return cls._of(model, cuts, before, changed)

    @classmethod
    def _of(cls, model: nn.Module, cuts: Cuts, before: "Shape | None", changed: Iterable[str]) -> "Shape":
        config = rebuild.config_of(model)
        full = rebuild.build(config, "meta")
        setattr(full, BY_QUERY, getattr(model, BY_QUERY, None))
        first = _widths(full, full)
        gone = sum(len(dropped(units, removal)) for units, removal in cuts)
        left = list(range(len(find_blocks(full)) + gone))
        for units, removal in cuts:
            left = [index for place, index in enumerate(left) if place not in dropped(units, removal)]
        layers = follow_cuts(before.layers if before else _whole(first, len(find_blocks(full)) + gone, left), cuts)
        if len(layers) != len(find_blocks(full)):
            raise ValueError(f"the model has {len(find_blocks(full))} layers, and by its cuts {len(layers)}")
        for kind, widths in _widths(model, full).items():
            for layer, width in zip(layers, widths, strict=True):
                if width is not None and width != getattr(layer, kind).kept:
                    raise ValueError(
                        f"layer {layer.index} has {width} {kind}, and by the cuts {getattr(layer, kind).kept}"
                    )
        names = set(_names(full))
        biases = [n.removesuffix(".bias") for n in _names(model) if n.endswith(".bias") and n not in names]
        path = find_blocks(model)[0].name.rpartition(".")[0]
        earlier = {name: Origin(name) for name in (before.changed if before else ())}
        others = {*trace(earlier, path, cuts), *changed} & set(_names(model))
        queries = _by_query(full)
        shape = cls(tuple(layers), config, tuple(biases), tuple(sorted(others)), _parameters(model), queries)
        if found := rebuild.difference(shape.build(), model):
            raise ValueError(f"this {type(model).__name__} is not what its config and widths say: {found}")
        return shape

    def build(self, device: str | None = None) -> nn.Module:
        """The model without weights. device: see `rebuild.build`.

        Raises:
            ValueError: transformers refuses the config, or the counts do not fit it.
        """
        model = rebuild.build(self.config, device)
        setattr(model, BY_QUERY, self.queries)
        for kind in COUNTED:
            counts = [getattr(layer, kind) for layer in self.layers]
            if any(count is not None and count.kept < count.of for count in counts):
                blocks = find_blocks(model)
                units = find_units(model, blocks, (kind,))
                cut(model, blocks, units, _firsts(units, counts))
        for name in self.biases:
            linear = model.get_submodule(name)
            linear.bias = nn.Parameter(torch.empty_like(linear.weight[:, 0]))  # type: ignore[index]
        return model

    def write(self, folder: Path) -> None:
        """Write structure.json into a folder."""
        content = {
            "version": VERSION,
            **{key: getattr(self, key) for key in ("layout", "load", "parameters", "queries", "biases", "changed")},
            "layers": LAYERS,
            "config": self.config,
        }
        lines = ",\n  ".join(json.dumps(_entry(layer)) for layer in self.layers)  # a line for each layer
        text = json.dumps(content, indent=1).replace(f'"{LAYERS}"', f"[\n  {lines}\n ]")
        (folder / STRUCTURE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Shape | None":
        """The shape that a checkpoint's folder tells; None where it has no structure.json.

        Raises:
            ValueError: its structure.json cannot be read, or is of a later version.
        """
        file = Path(folder) / STRUCTURE_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["version"] > VERSION:
                raise ValueError(f"version {content['version']} is later than {VERSION}; update sparsekit")
            layers = tuple(_layer(entry) for entry in content["layers"])
            rest: dict[str, Any] = {key: tuple(content[key]) for key in ("biases", "changed")}
            rest |= {key: content[key] for key in ("config", "parameters", "layout", "load")}
            rest["queries"] = content.get("queries", False)
            return cls(layers, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} does not describe a model: {type(error).__name__}: {error}") from error


def whole_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model out of which nothing was cut; works on the meta device."""
    return _whole(_widths(model, model), len(find_blocks(model)))


def follow_cuts(layers: Sequence[Layer], cuts: Cuts) -> list[Layer]:
    """The layers that cuts leave, one cut after another."""
    left = list(layers)
    for units, removal in cuts:
        for part, kept in zip(units.parts, units.split(removal.kept), strict=True):
            kind = PARTS.get(part.kind, part.kind)
            if kind != "layers":
                count = getattr(left[part.block], kind)
                assert count is not None  # who found units knows how many there are
                mask = kept if part.kind == kind else kept.expand(count.kept)
                chosen = tuple(unit for unit, stays in zip(count.units, mask.tolist(), strict=True) if stays)
                counts: dict[str, Any] = {kind: Count(chosen, count.of)}
                left[part.block] = replace(left[part.block], **counts)
        gone = dropped(units, removal)
        left = [layer for index, layer in enumerate(left) if index not in gone]
    return left


def _by_query(model: nn.Module) -> bool:
    try:
        return any(part.one_key for part in find_units(model, find_blocks(model), ("heads",)).parts)
    except ValueError:
        return False


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _whole(widths: dict[str, list[int | None]], count: int, left: Sequence[int] | None = None) -> list[Layer]:
    """Layers as wide as the layers that are left; those that were dropped, as the first that has any.

    widths: a kind -> of each layer that is left; left: their numbers among `count`; None: all are left
    """
    places = {index: place for place, index in enumerate(range(count) if left is None else left)}
    layers = []
    for index in range(count):
        counts = {}
        for kind, each in widths.items():
            some = next((known for known in each if known is not None), None)
            width = each[places[index]] if index in places else some
            if width is not None:
                counts[kind] = Count(tuple(range(width)), width)
        layers.append(Layer(index, **counts))
    return layers


def _widths(model: nn.Module, full: nn.Module) -> dict[str, list[int | None]]:
    """The kinds whose roles are known in this family -> how many units each layer has, None where it has none.

    full: the model before cuts
    """
    modules = dict(model.named_modules())
    blocks = find_blocks(full)
    found: dict[str, list[int | None]] = {}
    for kind in COUNTED:
        try:
            units = find_units(full, blocks, (kind,))
        except ValueError:
            continue  # none of them can have been cut
        found[kind] = [None] * len(blocks)
        for part in units.parts:
            if part.home:
                experts: Any = modules[part.home]
                found[kind][part.block] = experts.count
                continue
            name = str(part.output)
            module = modules.get(name)
            width = Linear(name, module).shape[1] if module is not None and is_linear(module) else 0
            found[kind][part.block] = width // part.columns.shape[1]
    return found


def _firsts(units: Units, counts: Sequence[Count]) -> Tensor:
    """A mask (units,) that keeps the first of each part, as many as counted."""
    for part in units.parts:
        if counts[part.block].kept > part.count:
            raise ValueError(
                f"layer {part.block} would keep {counts[part.block].kept} {part.kind}, its config has {part.count}"
            )
    return torch.cat(
        [
            # all are all, also where an earlier version counted a whole attention as one
            torch.arange(part.count) < (count.kept if count.kept < count.of else part.count)
            for part in units.parts
            for count in [counts[part.block]]
        ]
    )


def _entry(layer: Layer) -> dict[str, Any]:
    """JSON: counts, and the units that are left as bits, the first unit in the lowest, where some are gone."""
    entry: dict[str, Any] = {"layer": layer.index}
    for kind in COUNTED:
        count = getattr(layer, kind)
        if count is not None:
            entry[kind] = [count.kept, count.of]
            if count.kept < count.of:
                entry[f"{kind}_kept"] = hex(sum(1 << unit for unit in count.units))
    return entry


def _layer(entry: dict[str, Any]) -> Layer:
    counts = {}
    for kind in COUNTED:
        if kind in entry:
            kept, of = entry[kind]
            bits = int(entry.get(f"{kind}_kept", hex((1 << of) - 1)), 16)
            units = tuple(unit for unit in range(of) if bits >> unit & 1)
            if len(units) != kept:
                raise ValueError(f"layer {entry['layer']} keeps {kept} {kind}, and by {kind}_kept {len(units)}")
            counts[kind] = Count(units, of)
    return Layer(entry["layer"], **counts)
