"""Prove from disk that a checkpoint is what it should be. Works on anybody's checkpoint folder."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.maths import NM, Quantization, Unstructured, parse
from sparsekit.model import Checkpoint, Linear, Loaded, find_blocks, missing_tensors, resized_by, skeleton
from sparsekit.model.structure import Shape
from sparsekit.results.structure_proof import prove_structure


@dataclass
class Verification:
    """What was found: failures (sentences; none means verified), and each block linear's zeros."""

    failures: list[str] = field(default_factory=list)
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
    masks: dict[str, Tensor] | None = None,
    patterns: dict[str, str] | None = None,
    quantization: Quantization | None = None,
    trained: Collection[str] = (),
    cast: bool = False,
    trust_remote_code: bool = False,
) -> Verification:
    """Re-open a checkpoint and check it tensor by tensor.

    Always: every tensor that the model needs is there, finite, tied weights agree, no -0.0 in the blocks' linears.
    pattern: every linear of the blocks must have it ("2:4", "50%"; of an unstructured one's zeros, rounding may lose
        less than one a row or a column, whatever the scope of the mask was).
    patterns: name of a linear -> its own pattern; linears that are not named count as not pruned.
    masks: name of a linear -> what was kept (out, in); a weight outside it must be zero.
    quantization: every weight of the linears must lie on such a grid.
    trained: names of other parameters that a stage says it changed, such as norms and biases.
    against: the source checkpoint; everything but the weights of the blocks' linears must equal it bit for bit, and
        the linears' shapes and dtypes must be the same.
    A checkpoint that structures were cut out of is compared row by row and column by column (`structure.proof`).
    cast: compare with `against` after casting it to the checkpoint's dtype, for a run that changed the dtype.

    Raises:
        ValueError: the folder is no checkpoint, a file is truncated, or the pattern cannot be read.
    """
    checkpoint = Checkpoint(path)
    if against is not None and (stage := resized_by(checkpoint.folder)):
        raise ValueError(
            f"{path} was resized by `{stage}`, which changes every tensor, so there is nothing to compare with a "
            "source; verify it without one"
        )
    asked = parse(pattern) if pattern is not None else None
    model = skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    prefix = str(model.base_model_prefix)
    linears = {linear.name: linear for block in find_blocks(model) for linear in block.linears.values()}
    kind: Any = Checkpoint
    if not checkpoint.names(prefix) >= {f"{name}.weight" for name in linears}:
        kind = partial(Loaded, trust_remote_code=trust_remote_code)
        checkpoint = kind(path)
    source = kind(against) if against is not None else None
    if patterns is not None:
        linears = {name: linear for name, linear in linears.items() if name in patterns}
    result = Verification()
    weights = {f"{name}.weight": name for name in linears}
    cut = Shape.read(checkpoint.folder) is not None
    result.failures += _structure(model, checkpoint, prefix, trust_remote_code, cut)
    if cut and source is not None:
        names = {f"{name}.weight" for name in patterns or ()} | set(trained)
        result.failures += prove_structure(
            checkpoint.folder, source.folder, changed=names, cast=cast, trust_remote_code=trust_remote_code
        )
    for key in checkpoint:
        name = weights.get(key) or weights.get(f"{prefix}.{key}")
        tensor = checkpoint.tensor(key)
        if tensor.is_floating_point() and not _finite(tensor):
            result.failures.append(f"{key} contains NaN or Inf")
        if source is not None and not cut:
            changed = name is not None or key in trained or f"{prefix}.{key}" in trained
            result.failures += _unchanged(key, tensor, source, prefix, weight=changed, cast=cast)
        if name is not None:
            wanted = parse(patterns[name]) if patterns is not None else asked
            _linear(linears[name], tensor, wanted, (masks or {}).get(name), result)
            if quantization is not None:
                result.failures += _off_grid(linears[name], tensor, quantization)
    return result


def _finite(tensor: Tensor) -> bool:
    """No NaN and no Inf: the extremes tell, in one pass without a mask."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _structure(model: Any, checkpoint: Checkpoint, prefix: str, trust_remote_code: bool, cut: bool) -> list[str]:
    """Missing tensors (transformers would fill them with random numbers), wrong shapes, untied copies."""
    failures, absent = [], []
    state = model.state_dict()
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})  # copy -> what it is tied to
    for name, tensor in state.items():
        try:
            key = checkpoint.key(name, prefix)
        except ValueError:
            if name not in tied and name not in tied.values():
                absent.append(name)
            continue
        shape = checkpoint.shape(key)
        if shape != tuple(tensor.shape):
            failures.append(f"{name} has shape {shape}, the config says {tuple(tensor.shape)}")
        partner = tied.get(name)
        if (
            partner is not None
            and partner in checkpoint
            and not torch.equal(checkpoint.tensor(key), checkpoint.tensor(partner))
        ):
            failures.append(f"{name} and {partner} are tied in the config but differ on disk")
    if absent:  # some families are stored under other names (experts one by one): only loading tells
        lost = absent if cut else missing_tensors(checkpoint.folder, trust_remote_code)
        failures += [f"{name} is missing: loading would fill it with random numbers" for name in absent if name in lost]
    for copy, kept in tied.items():
        if not any(stored_key(checkpoint, name, prefix) for name in (copy, kept)):
            failures.append(f"{copy} and {kept} are tied and neither is stored")
    return failures


def stored_key(checkpoint: Checkpoint, name: str, prefix: str) -> str | None:
    """The stored name of a parameter, or None."""
    try:
        return checkpoint.key(name, prefix)
    except ValueError:
        return None


def _unchanged(key: str, tensor: Tensor, source: Checkpoint, prefix: str, *, weight: bool, cast: bool) -> list[str]:
    origin = stored_key(source, key, prefix)
    if origin is None:
        return [f"{key} is not in {source.folder}"]
    dense = source.tensor(origin)
    dense = dense.to(tensor.dtype) if cast else dense
    if dense.shape != tensor.shape or dense.dtype != tensor.dtype:
        return [f"{key} is {tensor.dtype} {tuple(tensor.shape)}, in {source.folder} {dense.dtype} {tuple(dense.shape)}"]
    return [] if weight or torch.equal(dense, tensor) else [f"{key} differs from {source.folder}"]


def _off_grid(linear: Linear, stored: Tensor, quantization: Quantization) -> list[str]:
    try:
        quantization.recover(stored.t() if linear.transposed else stored, linear.name)
    except ValueError as error:
        return [str(error)]
    return []


def _linear(
    linear: Linear, stored: Tensor, pattern: Unstructured | NM | None, mask: Tensor | None, result: Verification
) -> None:
    tensor = stored.t() if linear.transposed else stored  # (out, in)
    zero = tensor == 0
    zeros = int(zero.count_nonzero())
    result.per_linear[linear.name] = {
        "sparsity": zeros / tensor.numel(),
        "pattern": str(pattern) if pattern else None,
        "zeros": zeros,
        "parameters": tensor.numel(),
    }
    negative = int((zero & torch.signbit(tensor)).count_nonzero())
    if negative:
        result.failures.append(f"{linear.name} holds {negative:,} times -0.0; a zero must be written as 0.0")
    lost = zero.numel() - int((zero | mask).count_nonzero()) if mask is not None else 0
    if lost:
        result.failures.append(f"{linear.name} has {lost:,} weights where its mask says zero")
    if isinstance(pattern, NM):
        if tensor.shape[1] % pattern.group or not pattern.satisfied(tensor):
            result.failures.append(f"{linear.name} is not {pattern}: {zeros / tensor.numel():.2%} of it is zero")
    elif pattern is not None and zeros <= pattern.sparsity * tensor.numel() - max(tensor.shape):
        result.failures.append(f"{linear.name} has {zeros / tensor.numel():.2%} zeros, {pattern} was asked")
