"""Proof from disk that a cut model is its source with units taken out, and changed only where that is said."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model import (
    Checkpoint,
    Tensors,
    build_from,
    choose_layout,
    difference,
    find_blocks,
    is_linear,
    read_json,
    skeleton,
    tied_names,
)
from sparsekit.model.structure import (
    COUNTED,
    Cuts,
    Layer,
    Origin,
    Removal,
    Shape,
    find_units,
    follow_cuts,
    trace,
    whole_layers,
)
from sparsekit.results.soundness import bad_values, unsound


def prove_structure(
    folder: str | Path,
    source: str | Path,
    cuts: Cuts | None = None,
    *,
    changed: Iterable[str] = (),
    cast: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """What is wrong with a folder that `storage.save` wrote, as sentences; none: it is proved.

    Every tensor that the model needs is there, finite and of the shape that the folder's config says; tied weights
    agree; nothing is there besides; structure.json has the units that `cuts` kept; config.json and the modeling file
    say the same as structure.json; every kept row and column equals the source's bit for bit, or what a removal changed
    it to.

    source: the checkpoint that the run began with
    cuts: as they were made: the units of the model before each, and what was decided; None: those that structure.json
        tells, and what it says was changed may be anything
    changed: parameters, by their names in the cut model, that were changed after the cuts: their values are free
    cast: compare with the source cast to the stored dtype, for a run that changed it

    Raises:
        ValueError: the source is no checkpoint, is damaged, or is cut itself and `cuts` is None; or the folder's
            structure.json is damaged.
    """
    shape = Shape.read(folder)
    if shape is None:
        return [f"{folder} has no structure.json"]
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    dense = skeleton(source, trust_remote_code=trust_remote_code)
    begun = Shape.read(source)
    layers = begun.layers if begun else whole_layers(dense)
    if cuts is None and list(layers) != whole_layers(dense):
        raise ValueError(f"{source} is cut itself; compare with the checkpoint that nothing was cut out of")
    origin = Tensors(Checkpoint(source), dense)
    free = {*changed, *(shape.changed if cuts is None else ())}
    home = find_blocks(model)[0].name.rpartition(".")[0] + "."
    told = shape.changed if cuts is None else ()
    failures = [
        f"structure.json says that {name} was changed, which is in no block" for name in told if home not in f"{name}."
    ]
    cuts = _told_cuts(shape, dense) if cuts is None else cuts
    traced = _traced(origin, dense, model, cuts)
    stored = Tensors(Checkpoint(folder), model)
    failures += unsound(stored)
    spare = 0
    for name, tensor in stored.items():
        failures += bad_values(stored, name, tensor)
        if name in traced:
            expected = traced[name].read(origin)
            expected = expected.to(tensor.dtype) if cast else expected
            failures += _unequal(name, tensor, expected, source, name in free)
        elif name.endswith(".bias") and not tensor.any():
            spare += tensor.numel()  # a config gives biases to all linears of a kind, or to none
        elif name not in free:
            failures.append(f"{name} is neither in {source} nor among what was changed")
    failures += _miscounted(shape, follow_cuts(layers, cuts))
    parameters = sum(parameter.numel() for parameter in model.parameters()) - spare
    if parameters != shape.parameters:
        failures.append(f"the model has {parameters:,} parameters, structure.json says {shape.parameters:,}")
    return failures + _untrue(Path(folder), shape)


def _traced(origin: Tensors, dense: nn.Module, model: nn.Module, cuts: Cuts) -> dict[str, Origin]:
    turned = {name for name, module in dense.named_modules() if is_linear(module) and not isinstance(module, nn.Linear)}
    begin = {name: Origin(name, transposed=name.rpartition(".")[0] in turned) for name in origin}
    traced = trace(begin, find_blocks(dense)[0].name.rpartition(".")[0], cuts)
    for copy, kept in tied_names(model).items():  # the source may have stored the other one of the two
        if copy in traced:
            traced.setdefault(kept, traced[copy])
    return traced


def _unequal(name: str, tensor: Tensor, expected: Tensor, source: Any, changed: bool) -> list[str]:
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return [
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, what is kept of {source} is {expected.dtype} "
            f"{tuple(expected.shape)}"
        ]
    return [] if changed or torch.equal(tensor, expected) else [f"{name} is not what was kept of {source}"]


def _miscounted(shape: Shape, layers: Sequence[Layer]) -> list[str]:
    """Where structure.json counts other units than those that were kept."""
    if [layer.index for layer in layers] != [layer.index for layer in shape.layers]:
        return [
            f"structure.json has the layers {_ranges(shape.layers)} of the source, those kept are {_ranges(layers)}"
        ]
    return [
        f"structure.json does not have the {kind} of layer {said.index} that were kept"
        for kept, said in zip(layers, shape.layers, strict=True)
        for kind in COUNTED
        if getattr(kept, kind) != getattr(said, kind)
    ]


def _ranges(layers: Sequence[Layer]) -> str:
    return ", ".join(str(layer.index) for layer in layers)


def _told_cuts(shape: Shape, dense: nn.Module) -> Cuts:
    """The cuts of the source that structure.json tells; all layers that go, go last."""
    blocks = find_blocks(dense)
    left = {layer.index: layer for layer in shape.layers}
    cuts = []
    for together in (["heads", "channels", "mamba"], ["experts"]):
        kinds = [kind for kind in together if any(getattr(layer, kind) is not None for layer in shape.layers)]
        if not kinds:
            continue
        units = find_units(dense, blocks, kinds)
        masks = [torch.ones(part.count, dtype=torch.bool) for part in units.parts]
        for part, mask in zip(units.parts, masks, strict=True):
            if part.block in left and (count := getattr(left[part.block], part.kind)) is not None:
                mask[:] = False
                mask[list(count.units)] = True
        cuts.append((units, Removal(kinds, torch.cat(masks))))
    kept = torch.tensor([block.index in left for block in blocks])
    return [*cuts, (find_units(dense, blocks, ["layers"]), Removal(["layers"], kept))]


def _untrue(folder: Path, shape: Shape) -> list[str]:
    """Where config.json and the modeling file are not what goes with structure.json."""
    layout = choose_layout(shape.build(), shape)
    failures = []
    if read_json(folder / "config.json") != layout.config:
        failures.append("config.json does not say what structure.json says")
    for name, text in layout.files.items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            failures.append(f"{name} is not the file that sparsekit writes for this family")
    if layout.files and not failures:
        found = difference(build_from(folder), shape.build())
        failures += [f"{next(iter(layout.files))} builds another model: {found}"] if found else []
    return failures
