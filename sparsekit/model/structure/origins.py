"""Which rows and columns of which tensor of the source each tensor of a cut model comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparsekit.model.structure.experts import ExpertCount, with_more
from sparsekit.model.structure.layers import places_left
from sparsekit.model.structure.removal import Removal
from sparsekit.model.structure.units import Part, Units

Cuts = Sequence[tuple[Units, Removal]]  # of one model, one after another: its units before each, and what was decided


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    tensor: its name in the source, or what a removal changed it to
    rows, columns: of it as (out, in); None: all
    transposed: it is stored (in, out)
    """

    tensor: str | Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    transposed: bool = False

    def read(self, source: Mapping[str, Tensor]) -> Tensor:
        """The tensor as it must be stored."""
        tensor = source[self.tensor] if isinstance(self.tensor, str) else self.tensor
        turned = self.transposed and tensor.dim() == 2
        tensor = tensor.t() if turned else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        tensor = tensor if self.columns is None else tensor[:, self.columns]
        return tensor.t() if turned else tensor

    def narrowed(self, dim: int, places: Tensor) -> "Origin":
        """What is left of it when these places of its rows (dim 0) or columns (dim 1) are left."""
        before = self.columns if dim else self.rows
        left = places if before is None else before[places]
        return replace(self, columns=left) if dim else replace(self, rows=left)


def trace(traced: dict[str, Origin], path: str, cuts: Cuts) -> dict[str, Origin]:
    """Where each tensor comes from that is left after the cuts, by its name then.

    traced: name -> where each comes from before them
    path: the name of the list of blocks
    """
    for units, removal in cuts:
        traced = dict(traced)
        for name, tensor in removal.changed.items():
            twin = traced.get(f"{name.rpartition('.')[0]}.weight")
            traced[name] = Origin(tensor, transposed=twin is not None and twin.transposed)
        traced = _cut(traced, path, units, removal)
    return traced


def dropped(units: Units, removal: Removal) -> set[int]:
    """The indices of the layers that a cut removes whole."""
    parts = zip(units.parts, units.split(removal.kept), strict=True)
    return {part.block for part, kept in parts if part.kind == "layers" and not kept}


def _cut(traced: dict[str, Origin], path: str, units: Units, removal: Removal) -> dict[str, Origin]:
    layers = dropped(units, removal)
    gone = {f"{path}.{index}." for index in layers}  # beginnings of names
    for part, kept in zip(units.parts, units.split(removal.kept), strict=True):
        if part.experts is not None:
            traced = _fewer(traced, part, part.experts, f"{path}.{part.block}.", kept)
        elif part.kind != "layers" and not kept.any():
            gone |= _homes(part, f"{path}.{part.block}.")
        elif part.kind != "layers":
            _narrow(traced, part, kept)
    parts = zip(units.parts, units.split(removal.kept), strict=True)
    for name, (dim, places) in places_left([part.outside for part, kept in parts if not kept.any()]).items():
        if name in traced:
            traced[name] = traced[name].narrowed(dim, places)
    left = {name: each for name, each in traced.items() if not name.startswith(tuple(gone))}
    return {_renumbered(name, path, layers): each for name, each in left.items()}


def _fewer(traced: dict[str, Origin], part: Part, count: ExpertCount, block: str, kept: Tensor) -> dict[str, Origin]:
    """Experts that are left are numbered anew, and routers have a row for each of them."""
    chosen = kept.nonzero().flatten()
    new = {str(old): str(index) for index, old in enumerate(chosen.tolist())}
    left = {}
    for name, origin in traced.items():
        number, _, rest = name.removeprefix(f"{part.home}.").partition(".")
        if (row := count.rows.get(name.removeprefix(block))) is not None:
            left[name] = origin.narrowed(row[0], with_more(chosen, len(kept), row[1]))
        elif not name.startswith(f"{part.home}.") or not number.isdigit():
            left[name] = origin
        elif number in new:
            left[f"{part.home}.{new[number]}.{rest}"] = origin
    return left


def _homes(part: Part, block: str) -> set[str]:
    """Beginnings of the names of what goes with a part: of the module around it, or of its linears if there is none."""
    assert part.output is not None
    home = part.output.removeprefix(block).rpartition(".")[0]
    return {f"{block}{home}."} if home else {f"{name}." for name in (*part.inputs, part.output)}


def _narrow(traced: dict[str, Origin], part: Part, kept: Tensor) -> None:
    for name in part.inputs:
        chosen = part.rows_left(name, kept)
        for full in (f"{name}.weight", f"{name}.bias"):
            if full in traced:
                traced[full] = traced[full].narrowed(0, chosen)
    for name in part.beside:
        if name in traced:
            traced[name] = traced[name].narrowed(0, part.rows_left(name, kept))
    for name, columns in {str(part.output): part.columns, **part.readers}.items():
        if (full := f"{name}.weight") in traced:
            traced[full] = traced[full].narrowed(1, columns[kept].flatten())


def _renumbered(name: str, path: str, gone: set[int]) -> str:
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{int(number) - sum(index < int(number) for index in gone)}.{rest}"
