"""What a stage found for a block, and whether it is what the stage declares: checked before anything reaches the disk.

Every stage that prunes or trains leaves its findings in the blocks: `masks`, `records`, `trained` and `notes`, the
weights in place. They are checked here by the same code for everybody, ours and plugins alike.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.contracts import Effect, StageError
from sparsekit.maths import Pattern, Unstructured, has_pattern
from sparsekit.model import Block


def check_zeros(name: str, kept: Tensor, pattern: Pattern) -> None:
    """Raise ValueError unless a mask (out, in), true where a weight of linear `name` stays, has the pattern.

    An n:m pattern must hold in every group. Of an unstructured one rounding may lose less than one weight per row or
    column, whatever the scope of its mask was. More zeros than asked are allowed.
    """
    if not has_pattern(kept, pattern):
        zeros = kept.numel() - int(kept.count_nonzero())
        raise ValueError(f"the answer for {name} has {zeros:,} zeros, which is not {pattern}")


def prune_linear(block: Block, name: str, solved: Tensor, pattern: Pattern, **record: Any) -> None:
    """Write a linear's pruned weight (out, in) into its block, with its mask and record.

    record: what else is known of it: error, seconds, warnings

    Raises:
        ValueError: it is not a finite tensor of the weight's shape with the pattern's zeros; nothing was written.
    """
    linear = block.linears[name]
    if solved.shape != linear.shape or not solved.isfinite().all():
        raise ValueError(f"the answer for {name} is not a finite tensor of shape {linear.shape}")
    kept = solved != 0
    check_zeros(name, kept, pattern)
    block.masks[name] = kept.cpu()
    block.records[name] = record_of(kept, pattern, **record)
    linear.write_pruned(solved)


def leave_dense(block: Block, name: str, why: str) -> None:
    """Say that a linear of a block that is being pruned stays as it is; `why` is told to the user."""
    linear = block.linears[name]
    kept = torch.ones(linear.shape, dtype=torch.bool)
    block.masks[name] = kept
    block.records[name] = record_of(linear.weight != 0, Unstructured(0), error=0.0, warnings=[why])


def record_of(
    kept: Tensor,
    pattern: Pattern,
    *,
    error: float | None = None,
    seconds: float = 0.0,
    warnings: Iterable[str] = (),
) -> dict[str, Any]:
    """What the report has of a linear. kept: (out, in). error: of its outputs, None where nobody measured it."""
    zeros, count = kept.numel() - int(kept.count_nonzero()), kept.numel()
    said = set(warnings)
    if zeros / count - pattern.sparsity > 0.05 and pattern.sparsity:
        # legal (dead inputs, zeros in the dense weight), but a user should know of many
        said.add(f"{zeros / count - pattern.sparsity:.0%} more zeros than {pattern} asks for")
    return {
        "error": error,
        "seconds": seconds,
        "sparsity": zeros / count,
        "zeros": zeros,
        "parameters": count,
        "pattern": str(pattern),
        "warnings": sorted(said),
    }


def mean_error(block: Block) -> float | None:
    """The mean relative error over a block's linears; None where no stage measured any."""
    known = [record["error"] for record in block.records.values() if record["error"] is not None]
    return sum(known) / len(known) if known else None


class Inspector:
    """Holds one stage to its effect: `remember` a block before the stage touches it, `admit` it afterwards.

    stage: what to call it in a message, with its package
    patterns: a linear's name -> the pattern that it is to get
    earlier: a block's masks (out, in) by earlier stages, by the names of its linears; empty where there are none
    """

    def __init__(self, stage: str, effect: Effect, patterns: Mapping[str, Pattern]):
        self.stage, self.effect, self.patterns = stage, effect, patterns
        self.before: dict[int, dict[str, str]] = {}  # by the block's index
        self.trained: dict[int, set[str]] = {}  # what earlier stages trained

    def remember(self, block: Block) -> None:
        """Take the digests of all tensors of the block but those that the stage may change anyhow."""
        free = self._weights(block) if self.effect.prunes and self.effect.moves else set()
        self.before[block.index] = digests(block.module, free)
        self.trained.setdefault(block.index, set(block.trained))
        block.masks, block.trained = {}, set()

    @torch.no_grad()
    def admit(self, block: Block, earlier: Mapping[str, Tensor]) -> None:
        """Check what the stage left in a block; of a stage that gives masks alone, apply them.

        earlier: the masks (out, in) of stages before, by the names of the block's linears

        Raises:
            StageError: the stage did something else than it declares; the message says what.
        """
        try:
            self._unchanged(block)
            if self.effect.prunes:
                self._pruned(block)
            elif block.masks:
                raise ValueError(f"it gives a mask for {min(block.masks)}, and does not declare that it prunes")
            self._kept(block, earlier)
            for name, parameter in block.module.named_parameters():
                if not parameter.isfinite().all():
                    raise ValueError(f"{block.name}.{name} contains NaN or Inf")
            if self.effect.grid is not None:
                for linear in block.linears.values():
                    self.effect.grid.recover(linear.weight, linear.name)
            block.trained |= self.trained.pop(block.index)
        except ValueError as error:
            raise StageError(
                f"{self.stage} is not what it declares: {error}; nothing of {block.name} was kept"
            ) from error

    def _weights(self, block: Block) -> set[str]:
        return {f"{name}.weight".removeprefix(f"{block.name}.") for name in block.linears}

    def _unchanged(self, block: Block) -> None:
        """Whatever is not declared has the digest that it had."""
        if block.trained and not self.effect.moves:
            raise ValueError(f"it changed {min(block.trained)}, and does not declare that it moves weights")
        if unknown := block.trained - dict(block.module.named_parameters()).keys():
            raise ValueError(f"it says that it changed {min(unknown)}, which {block.name} does not have")
        before = self.before.pop(block.index)
        after = digests(block.module, dict(block.module.state_dict(keep_vars=True)).keys() - before.keys())
        if after.keys() != before.keys():
            raise ValueError(f"it added or removed {min(after.keys() ^ before.keys())}")
        for name, digest in after.items():
            if digest != before[name] and name not in block.trained:
                raise ValueError(f"{block.name}.{name} changed, and it does not say so")

    def _pruned(self, block: Block) -> None:
        """Every linear has its mask, exactly, and no weight outside it."""
        for name, linear in block.linears.items():
            kept = block.masks.get(name)
            if kept is None:
                raise ValueError(f"there is no mask for {name}")
            if kept.dtype != torch.bool or tuple(kept.shape) != linear.shape:
                raise ValueError(f"the mask of {name} is {kept.dtype} {tuple(kept.shape)}, not bool {linear.shape}")
            known = block.records.get(name, {})
            dense = known.get("pattern") == str(Unstructured(0))  # by leave_dense, which says so to the user
            pattern = Unstructured(0) if dense else self.patterns[name]
            check_zeros(name, kept, pattern)
            if not self.effect.moves:
                linear.write_pruned(linear.weight.masked_fill(~kept.to(linear.weight.device), 0))
            if int((linear.weight[~kept.to(linear.weight.device)]).count_nonzero()):
                raise ValueError(f"{name} has weights where its mask says zero")
            told = {key: known[key] for key in ("error", "seconds", "warnings") if key in known}
            block.records[name] = record_of(linear.weight != 0, pattern, **told)

    def _kept(self, block: Block, earlier: Mapping[str, Tensor]) -> None:
        """A stage that does not prune keeps the zeros of those that did, and their count is told as it is now."""
        if self.effect.prunes:
            return
        for name, kept in earlier.items():
            weight = block.linears[name].weight
            if int(weight[~kept.to(weight.device)].count_nonzero()):
                raise ValueError(f"{name} has weights again where an earlier stage pruned them")


def digests(module: nn.Module, without: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every parameter and buffer of a module, by name; equal digests are equal bits."""
    left_out = set(without)
    return {
        name: hashlib.sha256(_bytes(tensor)).hexdigest()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if name not in left_out
    }


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
