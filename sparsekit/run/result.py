"""What a run leaves: the model on disk, the proof that it is as asked, and the facts about it for the report."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparsekit.model import Block, Checkpoint, find_blocks, resized_by, save_model, skeleton, write_model, write_resized
from sparsekit.model.structure import COUNTED, Cuts, Shape
from sparsekit.results import MASKS, MODEL, Masks, state_of, verify
from sparsekit.run.plan import Plan
from sparsekit.run.segments import RESIZED, shape_of
from sparsekit.run.sequence import Outcome
from sparsekit.system import write_atomically, write_tensors


def save(planned: Plan, model: Any, tokenizer: Any, outcome: Outcome, output: Path) -> Shape | None:
    """Write model/, and the masks of pruned weights beside it.

    Returns:
        the shape of a model that structures were cut out of, else None
    """
    target = output / MODEL
    written = outcome.written if outcome.written is None or outcome.written.parent.parent == output else None
    source = planned.folder if planned.folder.is_dir() else None  # None: the model came in memory
    shape = None
    if outcome.written == target:  # a run that was killed after this
        shape = Shape.read(target)
    elif outcome.resized:
        told = partial(write_resized, model, stage=outcome.resized)
        write_model(model, tokenizer, target, source=source, weights=told)
    elif (shape := shape_of(planned, model, outcome.cuts, changed(outcome))) is not None:
        shape = save_model(model, tokenizer, target, shape, source=source, written=written)
    else:
        write_model(model, tokenizer, target, source=source, written=written)
    if outcome.masks is not None:
        bits = {name: mask for block in outcome.blocks for name, mask in outcome.masks.masks(block).items()}
        write_atomically(output / MASKS, lambda file: write_tensors(file, bits))
    return shape


def changed(outcome: Outcome) -> set[str]:
    """The parameters that stages changed after structures were cut, by their names in the result."""
    trained = {f"{block.name}.{inner}" for block in outcome.blocks for inner in block.trained}
    return trained | {f"{name}.weight" for name in _records(outcome)}


def prove(planned: Plan, output: Path, cuts: Cuts, patterns: dict[str, str], changed: set[str]) -> list[str]:
    """What is wrong with the model on disk, sentence by sentence; empty: it is as asked.

    patterns: of the pruned linears, by name. changed: see the function of that name.
    """
    trust, cast = planned.recipe.model.trust_remote_code, planned.recipe.model.dtype != "auto"
    pruned = (output / MASKS).is_file()
    if resized_by(output / "model"):  # nothing of the source is left to compare with
        found = verify(output / "model", patterns={}, trust_remote_code=trust)
        left = Checkpoint(output / "model")
        made = load_file(state_of(output, len(planned.segments) - 1) / RESIZED)
        same = set(left) == made.keys() and all(torch.equal(left.tensor(name), made[name]) for name in made)
        return found.failures + ([] if same else ["what is on disk is not what the stage left"])
    return verify(
        output / "model",
        against=planned.folder,
        masks=Masks(output) if pruned else None,
        patterns=patterns,
        quantization=planned.quantization,
        changed=changed,
        cuts=cuts,
        cast=cast,
        trust_remote_code=trust,
    ).failures


def claims(planned: Plan, found: dict[str, Any], changed: set[str], shape: Shape | None) -> dict[str, Any]:
    """What the run says that its result is, for the manifest: what `verify` holds it to."""
    return {
        "patterns": {name: each["pattern"] for name, each in found["sparsity"]["per_linear"].items()},
        "changed": sorted(changed | set(shape.changed if shape is not None else ())),
        "cast": planned.recipe.model.dtype != "auto",
        "quantization": planned.quantization.settings() if planned.quantization is not None else None,
    }


def facts(planned: Plan, outcome: Outcome, shape: Shape | None) -> dict[str, Any]:
    """What the report says of the pruned weights and structures."""
    records = _records(outcome)
    linears = [linear for block in outcome.blocks for linear in block.linears.values()]
    zeros = sum(record["zeros"] for record in records.values())
    parameters = sum(linear.weight.numel() for linear in linears)
    keys = ("sparsity", "pattern", "zeros", "parameters")
    found: dict[str, Any] = {
        "sparsity": {
            "total": zeros / max(1, parameters),
            "zeros": zeros,
            "parameters": parameters,
            "per_linear": {name: {key: record[key] for key in keys} for name, record in records.items()},
        },
        "error": {name: record["error"] for name, record in records.items() if record["error"] is not None},
        "blocks": {block.name: block.notes for block in outcome.blocks if block.notes},
        "warnings": {name: record["warnings"] for name, record in records.items() if record["warnings"]},
        "skipped": {name: why for block in outcome.blocks for name, why in block.skipped.items()},
    }
    if outcome.notes:
        found["notes"] = outcome.notes
    if shape is not None:
        found["structure"] = _structure(planned, outcome, shape)
    counts = found.get("structure", {}).get("parameters")
    whole = counts["dense"] if counts else sum(parameter.numel() for parameter in planned.model.parameters())
    gone = whole - counts["pruned"] if counts else 0
    found["sparsity"]["whole"] = {"parameters": whole, "gone": gone, "share": (zeros + gone) / whole}
    return found


def _structure(planned: Plan, outcome: Outcome, shape: Shape) -> dict[str, Any]:
    """Counts of what is left, beside the model that the recipe names, even where it goes on from an earlier run."""
    dense = planned.model
    if planned.dense != planned.folder:
        dense = skeleton(planned.dense, trust_remote_code=planned.recipe.model.trust_remote_code)
    begun = Shape.read(planned.dense)  # it may be cut itself
    blocks = find_blocks(dense)
    indices = [layer.index for layer in begun.layers] if begun else range(len(blocks))
    before = {index: _parameters(block) for index, block in zip(indices, blocks, strict=True)}
    after = [_parameters(block) for block in outcome.blocks]
    counts = []
    for layer, parameters in zip(shape.layers, after, strict=True):
        units = {kind: [count.kept, count.of] for kind in COUNTED if (count := getattr(layer, kind)) is not None}
        counts.append({**units, "parameters": [parameters, before[layer.index]]})
    return {
        "parameters": {"dense": sum(p.numel() for p in dense.parameters()), "pruned": shape.parameters},
        "total": 1 - sum(after) / sum(before.values()),
        "removed": [units.removed(removal.kept) for units, removal in outcome.cuts],
        "source_layers": max(indices) + 1,
        "layers": [layer.index for layer in shape.layers],
        "blocks": counts,
        "layout": shape.layout,
        "load": shape.load,
    }


def _parameters(block: Block) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())


def _records(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {name: record for block in outcome.blocks for name, record in block.records.items()}
