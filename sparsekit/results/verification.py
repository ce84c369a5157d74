"""Prove from disk that a checkpoint is what it should be. Works on anybody's checkpoint folder."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.maths import NM, Quantization, Unstructured, may_lose, parse
from sparsekit.model import Linear, Tensors, all_linears, decides, find_blocks, opened, resized_by, tied_names
from sparsekit.model.structure import Cuts, Shape
from sparsekit.results.settings_proof import prove_settings
from sparsekit.results.soundness import bad_values, unsound
from sparsekit.results.stored import Masks
from sparsekit.results.structure_proof import prove_structure
from sparsekit.system import count_bits, pack, track, unpack

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass
class Verification:
    """What was found.

    failures: sentences; none: everything that was asked holds
    unproved: sentences about what could not be compared with anything, so that nothing is known of it
    per_linear: each block linear's zeros
    """

    failures: list[str] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    per_linear: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sparsity over all linears of the blocks."""
        parameters = sum(entry["parameters"] for entry in self.per_linear.values())
        return sum(entry["zeros"] for entry in self.per_linear.values()) / parameters if parameters else 0.0


def verify(
    path: str | Path,
    pattern: str | None = None,
    against: str | Path | None = None,
    *,
    masks: Masks | None = None,
    patterns: dict[str, str] | None = None,
    quantization: Quantization | None = None,
    trained: Collection[str] = (),
    changed: Collection[str] | None = None,
    cuts: Cuts | None = None,
    cast: bool = False,
    trust_remote_code: bool = False,
) -> Verification:
    """Re-open a checkpoint as transformers would and check it tensor by tensor.

    Always: every tensor that the model needs is there once, of the right shape, finite, and nothing else is there; tied
    weights agree, no -0.0 in the blocks' linears.
    pattern: every linear of the blocks must have it ("2:4", "50%"; of an unstructured one's zeros, rounding may lose
        less than one a row or a column, whatever the scope of the mask was).
    patterns: name of a linear -> its own pattern; linears that are not named count as not pruned.
    masks: of the run; a weight outside them must be zero.
    quantization: every weight of the linears must lie on such a grid.
    trained: names of other parameters that a stage says it changed, such as norms and biases.
    changed: where it is known, all names whose values may differ from the source's; None: the weights of the blocks'
        linears and `trained`
    against: the source checkpoint; everything but what was changed must equal it bit for bit, shapes and dtypes must
        be the same, and so must config, tokenizer and generation config.
    cuts: how structures were cut out of the source, where it is known; None: as the folder's structure.json tells
    cast: compare with `against` after casting it to the checkpoint's dtype, for a run that changed the dtype.

    Raises:
        ValueError: the folder is no checkpoint, a file is truncated, or the pattern cannot be read.
    """
    asked = parse(pattern) if pattern is not None else None
    stored = opened(path, trust_remote_code=trust_remote_code)
    folder, result = stored.stored.folder, Verification()
    if against is not None and (stage := resized_by(folder)):
        raise ValueError(
            f"{path} was resized by `{stage}`, which changes every tensor, so there is nothing to compare with a "
            "source; verify it without one"
        )
    if patterns is not None:
        linears = {name: linear for name, linear in all_linears(stored.model).items() if name in patterns}
    else:
        blocks = find_blocks(stored.model)
        linears = {n: linear for block in blocks for n, linear in block.linears.items() if not decides(n)}
    weights = {f"{name}.weight": name for name in linears}
    cut = Shape.read(folder) is not None
    free = set(changed) if changed is not None else {*trained, *(weights if not cut or patterns else ())}
    result.failures += unsound(stored)
    source = None
    if against is not None:
        against = Path(against)
        result.failures += prove_settings(folder, against, cast=cast, cut=cut, trust_remote_code=trust_remote_code)
        if cut:
            result.failures += prove_structure(
                folder, against, cuts, changed=free, cast=cast, trust_remote_code=trust_remote_code
            )
            result.unproved += _told(folder, free) if cuts is None else []
        else:
            source = opened(against, trust_remote_code=trust_remote_code)
            result.failures += _absent(stored, source)
    state = stored.model.state_dict()
    for name, tensor in track(stored.items(), "proving", len(stored)):
        result.failures += bad_values(stored, name, tensor)
        if source is not None:
            result.failures += _unchanged(name, tensor, source, free=name in free, cast=cast)
        if name in weights and tensor.shape == state[name].shape and not tensor.is_complex():
            linear = weights[name]
            wanted = parse(patterns[linear]) if patterns is not None else asked
            mask = masks.packed(linear) if masks is not None and linear in masks else None
            _linear(linears[linear], tensor, wanted, mask, result)
            if quantization is not None:
                result.failures += _off_grid(linears[linear], tensor, quantization)
    result.failures = list(dict.fromkeys(result.failures))
    return result


def _told(folder: Path, known: Collection[str]) -> list[str]:
    """What structure.json alone says was changed."""
    shape = Shape.read(folder)
    names = sorted(set(shape.changed) - set(known)) if shape is not None else []
    if not names:
        return []
    return [
        f"{len(names)} tensors, the first is {names[0]}: structure.json says that they were changed, and nothing tells "
        "to what"
    ]


def _absent(stored: Tensors, source: Tensors) -> Iterator[str]:
    """What of the source is not there."""
    for name in source:
        if name not in stored and name not in tied_names(stored.model):
            yield f"{name} is in {source.stored.folder} and not here"
    for key in source.unused:
        yield f"{key} of {source.stored.folder} is no tensor of {type(stored.model).__name__}, and is gone"


def _unchanged(name: str, tensor: Tensor, source: Tensors, *, free: bool, cast: bool) -> list[str]:
    folder = source.stored.folder
    origin = name if name in source else tied_names(source.model).get(name, name)
    if origin not in source:
        return [f"{name} is not in {folder}"]
    dense = source[origin]
    dense = dense.to(tensor.dtype) if cast else dense
    if dense.shape != tensor.shape or dense.dtype != tensor.dtype:
        return [f"{name} is {tensor.dtype} {tuple(tensor.shape)}, in {folder} {dense.dtype} {tuple(dense.shape)}"]
    return [] if free or torch.equal(dense, tensor) else [f"{name} differs from {folder}"]


def _off_grid(linear: Linear, stored: Tensor, quantization: Quantization) -> list[str]:
    try:
        quantization.recover(linear.matrix(stored), linear.name)
    except ValueError as error:
        return [str(error)]
    return []


def _linear(
    linear: Linear, stored: Tensor, pattern: Unstructured | NM | None, mask: Tensor | None, result: Verification
) -> None:
    tensor = linear.matrix(stored)  # (out, in)
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # an 8-bit float has few operations
    kept = pack(tensor.bool())  # true for NaN too; all that follows reads a byte for eight weights
    zeros = tensor.numel() - count_bits(kept)
    result.per_linear[linear.name] = {
        "sparsity": zeros / tensor.numel(),
        "pattern": str(pattern) if pattern else None,
        "zeros": zeros,
        "parameters": tensor.numel(),
    }
    if negative := _negative_zeros(tensor):
        result.failures.append(f"{linear.name} holds {negative:,} times -0.0; a zero must be written as 0.0")
    lost = count_bits(kept & ~mask) if mask is not None else 0
    if lost:
        result.failures.append(f"{linear.name} has {lost:,} weights where its mask says zero")
    if isinstance(pattern, NM):
        if not _grouped(kept, tensor, pattern):
            result.failures.append(f"{linear.name} is not {pattern}: {zeros / tensor.numel():.2%} of it is zero")
    elif pattern is not None and zeros <= pattern.sparsity * tensor.numel() - may_lose(*tensor.shape):
        result.failures.append(f"{linear.name} has {zeros / tensor.numel():.2%} zeros, {pattern} was asked")


def _negative_zeros(tensor: Tensor) -> int:
    """How many numbers are -0.0: that of the smallest integer's bits, so that one look at the minimum tells of none."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0
    bits = tensor.view(BITS[tensor.element_size()])
    least = torch.iinfo(bits.dtype).min
    return int((bits == least).count_nonzero()) if int(bits.amin()) == least else 0


def _grouped(kept: Tensor, tensor: Tensor, pattern: NM) -> bool:
    """Whether every group of a tensor has the pattern. kept: what is no zero of it, packed."""
    if 8 % pattern.group or tensor.shape[1] % pattern.group:  # groups that do not lie within bytes
        return pattern.satisfied(tensor)
    every = unpack(torch.arange(256, dtype=torch.uint8), (256, 8))
    wrong = torch.tensor([not pattern.satisfied(byte) for byte in every.split(1)])
    return not bool(wrong[kept.int()].any())
