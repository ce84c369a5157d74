"""The walk: the model is the data set, a block is a batch, an epoch is one pass from the first block to the last."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from sparsekit.blocks import Block, Linear, first_inputs
from sparsekit.commits import Commits
from sparsekit.pattern import NM, Pattern
from sparsekit.statistics import Stats
from sparsekit.store import ActivationStore, give_back, tight

ERROR_CORRECTIONS = ("prefix", "none", "block", "model")


class BlockStream:
    """What Trainer.fit takes as its data: iterates over the blocks and carries activations from one to the next.

    inputs: what enters the first block, chunk by chunk
    error_correction: what a linear's inputs and its target are
        prefix  inputs from the pruned blocks before, target from the block's own dense weights on the same inputs
        none    dense inputs, dense targets
        block   the dense model's input to the block, pruned activations inside it, targets from the dense block
                (FISTAPruner, section 3.1); blocks do not depend on one another
        model   inputs from everything pruned before, targets from the dense model
    dense_inputs: for `model`, a second store that holds the same chunks
    dense_weight: gives a linear's dense weight (out, in), read from the source when its block is reached; None: the
        weight that is there
    commits: blocks that are committed there are restored instead of walked: resuming is starting further on
    """

    def __init__(
        self,
        blocks: list[Block],
        inputs: ActivationStore,
        dense_inputs: ActivationStore | None = None,
        *,
        error_correction: str = "prefix",
        dense_weight: Callable[[Linear], Tensor] | None = None,
        commits: Commits | None = None,
    ):
        if error_correction not in ERROR_CORRECTIONS:
            raise ValueError(f"error_correction is {error_correction!r}; it can be {', '.join(ERROR_CORRECTIONS)}")
        if (error_correction == "model") != (dense_inputs is not None):
            raise ValueError("dense_inputs belong to error_correction: model, and it needs them")
        self.blocks, self.inputs, self.dense_inputs = blocks, inputs, dense_inputs
        self.error_correction, self.dense_weight, self.commits = error_correction, dense_weight, commits
        self.start = 0 if commits is None else commits.count()
        self.device = torch.device("cpu")  # where blocks compute; the walk sets it

    @classmethod
    def over(
        cls,
        model: nn.Module,
        blocks: list[Block],
        tokens: Tensor,
        *,
        batch: int = 1,
        budget: int = 4 * 10**9,
        folder: str | Path | None = None,
        error_correction: str = "prefix",
        **options: Any,
    ) -> "BlockStream":
        """The stream that starts with a model's embedding of `tokens` (sequences, length).

        batch: sequences in a chunk. budget, folder: of the activations, see `ActivationStore`. The rest: see the class.
        """
        count = 2 if error_correction == "model" else 1
        stores = [ActivationStore(budget // count, folder) for _ in range(count)]
        for hidden in first_inputs(model, blocks, tokens, batch):
            for store in stores:
                store.append(hidden)
        return cls(blocks, *stores, error_correction=error_correction, **options)

    def close(self) -> None:
        """Forget the activations."""
        for store in (self.inputs, self.dense_inputs):
            if store is not None:
                store.close()

    def __len__(self) -> int:
        return len(self.blocks) - self.start

    def __iter__(self) -> Iterator[Block]:
        for block in self.blocks[: self.start]:
            self._replay(block.to(self.device))
            block.to("cpu")
        for block in self.blocks[self.start :]:
            self._read(block)
            yield block

    @torch.no_grad()
    def statistics(self, block: Block) -> Iterator[tuple[list[str], Stats]]:
        """Each group's linears and the one Stats they share, in call order.

        The caller writes a group's new weights before it asks for the next group: with `block` and `model` they change
        what the next group is given.
        """
        if self.error_correction in ("prefix", "none"):
            collected = self._collect(block)
            for names in block.groups:
                give_back()
                yield names, collected.pop(0)  # a Gram lives no longer than its group needs it
            return
        twin = block.twin()
        for group, names in enumerate(block.groups):
            collected = [self._collect_pairs(block, twin, group)]
            give_back()
            yield names, collected.pop()
        if block is not self.blocks[-1]:
            _advance(twin, self.dense_inputs or self.inputs)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Turn the inputs of a pruned block into those of the next."""
        if self.error_correction in ("prefix", "model") and block is not self.blocks[-1]:
            _advance(block, self.inputs)

    def _collect(self, block: Block) -> list[Stats]:
        """One pass with the block dense; with `none` its outputs are the next block's inputs at once."""
        collected: dict[int, Stats] = {}
        see = partial(_add, collected)
        groups = list(range(len(block.groups)))
        outputs = self.error_correction == "none" and block is not self.blocks[-1]
        for index, chunk in enumerate(self.inputs):
            if outputs:
                with block.watching(groups, see):
                    self.inputs[index] = block(chunk)
            else:
                block.until(chunk, groups, see)
        return [collected[group] for group in groups]

    def _collect_pairs(self, block: Block, twin: Block, group: int) -> Stats:
        """One group's inputs in the pruned block beside those in the dense one."""
        collected: dict[int, Stats] = {}
        same = self.dense_inputs is None and group == 0  # nothing before it has been pruned
        dense_chunks = iter(self.dense_inputs) if self.dense_inputs is not None else None
        for chunk in self.inputs:
            dense: dict[int, Tensor] = {}
            if not same:
                twin.until(next(dense_chunks) if dense_chunks else chunk, [group], dense.__setitem__)
            block.until(chunk, [group], partial(_add, collected, dense=dense))
        return collected[group]

    def _read(self, block: Block) -> None:
        if self.dense_weight is not None:
            for linear in block.linears.values():
                linear.write(self.dense_weight(linear))

    @torch.no_grad()
    def _replay(self, block: Block) -> None:
        """Do for the activations what the walk did when this block was pruned."""
        assert self.commits is not None
        if self.error_correction != "prefix" and block is not self.blocks[-1]:
            self._read(block)
            _advance(block, self.dense_inputs or self.inputs)
        self.commits.restore(block)
        self.advance(block)


def _add(
    collected: dict[int, Stats], group: int, inputs: Tensor, dense: Mapping[int, Tensor] = MappingProxyType({})
) -> None:
    """Add what enters a group, and what enters it in the dense block if that is known."""
    if group not in collected:
        collected[group] = Stats(inputs.shape[-1], device=inputs.device)
    collected[group].add(inputs, dense.get(group))


def _advance(block: Block, store: ActivationStore) -> None:
    for index, chunk in enumerate(store):
        store[index] = block(chunk)


class Walk(LightningModule):
    """Trainer.fit(Walk(stream), stream) walks over the blocks once.

    It has no parameters of its own and no optimizer: callbacks such as `OneShot` do the pruning when a block comes, the
    step logs the block's error and moves the stream on. `global_step` counts blocks.
    """

    def __init__(self, stream: BlockStream):
        super().__init__()
        self.stream = stream
        self._logged = 0

    def configure_optimizers(self) -> None:
        """None: nothing is trained, and automatic optimization keeps global_step counting."""
        return

    def on_train_start(self) -> None:
        """Tell the stream where blocks compute."""
        self.stream.device = self.device

    def training_step(self, block: Block, index: int) -> None:
        """Log what is known of the pruned block, compute what enters the next, take the block off the accelerator.

        After a resume, what the interrupted run had logged of earlier blocks is logged again first.
        """
        for known in self.stream.blocks[self._logged : block.index + 1]:
            log_block(self.trainer, known)
        self._logged = block.index + 1
        give_back()
        self.stream.advance(block)
        block.to("cpu")
        give_back()


def log_block(trainer: Trainer, block: Block) -> None:
    """Send the mean relative error and the sparsity of a finished block to the run's loggers."""
    if not block.records:
        return
    records = block.records.values()
    zeros, count = (sum(record[key] for record in records) for key in ("zeros", "parameters"))
    error = sum(record["error"] for record in records) / len(block.records)
    for logger in trainer.loggers:
        logger.log_metrics({"error": error, "sparsity": zeros / count}, step=block.index)


class OneShot(Callback):
    """Prunes every block when the walk reaches it, by one call of a layer-wise solver for each linear.

    solver: a Solver, or a chain of them
    patterns: linear's name -> Pattern
    seed: of torch's random numbers, set anew with each block's index added, so that a solver that draws some gives the
        same after a resume
    """

    def __init__(self, solver: Callable[..., Tensor], patterns: Mapping[str, Pattern], seed: int = 0):
        self.solver, self.patterns, self.seed = solver, patterns, seed

    def on_train_batch_start(self, trainer: Trainer, walk: Walk, block: Block, batch_idx: int) -> None:  # type: ignore[override]
        """Solve group by group, keep masks and records in the block, and tell callbacks that have on_linear_end.

        Raises:
            ValueError: weights or activations are not finite, or the solver broke its contract.
        """
        torch.manual_seed(self.seed + block.index)
        for names, stats in walk.stream.statistics(block):
            stats.check(names[0])
            for name in names:
                with tight():
                    self._solve(block, name, stats)
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if hasattr(callback, "on_linear_end"):
                        callback.on_linear_end(trainer, block, name)

    @torch.no_grad()
    def _solve(self, block: Block, name: str, stats: Stats) -> None:
        linear, pattern = block.linears[name], self.patterns[name]
        weight = linear.weight.float().contiguous()  # (out, in)
        if not weight.isfinite().all():
            raise ValueError(f"the weight of {name} contains NaN or Inf; repair the checkpoint before pruning it")
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            solved = self.solver(weight, stats, pattern)
        seconds = time.perf_counter() - started
        mask = solved != 0
        zeros = solved.numel() - int(mask.count_nonzero())
        _check_solved(name, weight, solved, zeros, pattern)
        block.records[name] = {
            "error": stats.error(solved, weight),
            "seconds": seconds,
            "sparsity": zeros / solved.numel(),
            "zeros": zeros,
            "parameters": solved.numel(),
            "pattern": str(pattern),
            "warnings": sorted({str(warning.message) for warning in said} | _too_sparse(weight, zeros, pattern)),
        }
        block.masks[name] = mask.cpu()
        linear.write_pruned(solved)


def _too_sparse(weight: Tensor, zeros: int, pattern: Pattern) -> set[str]:
    """More zeros than asked are legal (dead inputs, zeros in the dense weight) but a user should know of many."""
    surplus = zeros / weight.numel() - pattern.sparsity
    return {f"{surplus:.0%} more zeros than {pattern} asks for"} if surplus > 0.05 else set()


def _check_solved(name: str, weight: Tensor, solved: Tensor, zeros: int, pattern: Pattern) -> None:
    """A plugin's mistake must not reach the disk."""
    if solved.shape != weight.shape or not solved.isfinite().all():
        raise ValueError(f"the solver's answer for {name} is not a finite tensor of shape {tuple(weight.shape)}")
    if isinstance(pattern, NM):
        right = pattern.satisfied(solved)
    else:  # whatever the scope of its mask, rounding loses less than one weight per row or column
        right = zeros > pattern.sparsity * weight.numel() - max(weight.shape)
    if not right:
        raise ValueError(f"the solver's answer for {name} has {zeros:,} zeros, which is not {pattern}")


class Commit(Callback):
    """Puts every finished block on disk."""

    def __init__(self, commits: Commits):
        self.commits = commits

    def on_train_batch_end(self, trainer: Trainer, walk: Walk, outputs: Any, block: Block, batch_idx: int) -> None:  # type: ignore[override]
        """Commit the block; its masks are on disk then and leave the memory."""
        self.commits.commit(block)
        block.masks.clear()
