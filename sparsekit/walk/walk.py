"""The walk: the model is the data set, a block is a batch, an epoch is one pass from the first block to the last."""

import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sparsekit.maths import Norms, Pattern, Unstructured, rows_apart
from sparsekit.model import Block, may_rest, settle
from sparsekit.system import Team, give_back, tight
from sparsekit.walk.commits import Commits
from sparsekit.walk.findings import Inspector, mean_error, prune_linear
from sparsekit.walk.stream import SMALL, BlockStream

TOGETHER = 2**23  # weights of linears that are solved in one call, at most; of larger ones a call more costs nothing


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
        self.stream.move(self.device)

    def training_step(self, block: Block, index: int) -> Tensor:
        """Log what is known of the pruned block, compute what enters the next, take the block off the accelerator.

        After a resume, what the interrupted run had logged of earlier blocks is logged again first. The loss is a zero
        that leads nowhere: with several processes Lightning refuses a step without one.
        """
        if self.stream.pace == 1:  # else other processes have blocks in between
            self.log_blocks(block.index + 1)
        give_back()
        self.stream.advance(block)
        block.to("cpu")
        give_back()
        return torch.zeros((), device=self.device, requires_grad=True)

    def on_train_end(self) -> None:
        """Wait for the other processes: what they committed is complete then, and is logged in order."""
        self.trainer.strategy.barrier()
        if self.stream.pace > 1 and self.stream.commits is not None and self.trainer.is_global_zero:
            for block in self.stream.blocks:
                self.stream.commits.restore(block)
            self.log_blocks(len(self.stream.blocks))

    def log_blocks(self, stop: int) -> None:
        """Log all blocks up to `stop` that are not logged yet and known to this process."""
        for known in self.stream.blocks[self._logged : stop]:
            log_block(self.trainer, known)
        self._logged = stop


def log_block(trainer: Trainer, block: Block) -> None:
    """Send the mean relative error and the sparsity of a finished block to the run's loggers."""
    if not block.records:
        return
    records = block.records.values()
    zeros, count = (sum(record[key] for record in records) for key in ("zeros", "parameters"))
    error = mean_error(block)
    for logger in trainer.loggers:
        logger.log_metrics(({} if error is None else {"error": error}) | {"sparsity": zeros / count}, step=block.index)


class OneShot(Callback):
    """Prunes every block when the walk reaches it, by one call of a layer-wise solver for each linear.

    solver: a Solver, or a chain of them; or one for each linear, by its name
    patterns: linear's name -> Pattern
    continues: start from the weights that are there, which are the answer of the stages before, as the solver's `init`
    seed: of torch's random numbers, set anew for each linear, so that a solver that draws some gives the same after a
        resume and in whatever process it runs

    Where a solver's answer for a row depends on that row alone (`maths.rows_apart`), small linears of one input are
    solved in one call, and processes that walk together share out the rows of each. Of other solvers they share out the
    linears whose statistics are known at the same time.
    """

    def __init__(
        self,
        solver: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]],
        patterns: Mapping[str, Pattern],
        seed: int = 0,
        continues: bool = False,
    ):
        self.solver, self.patterns, self.seed, self.continues = solver, patterns, seed, continues
        self.answers: dict[str, Tensor] = {}  # of linears that were solved together with others, before the block

    def on_train_batch_start(self, trainer: Trainer, walk: Walk, block: Block, batch_idx: int) -> None:  # type: ignore[override]
        """Solve group by group, keep masks and records in the block, and tell callbacks that have on_linear_end.

        Raises:
            ValueError: weights or activations are not finite, or the solver broke its contract.
        """
        stream = walk.stream
        whole = [name for name in block.linears if not self._apart(name)]  # each of them is one process's work
        owners = stream.team.owners(_costs(block, whole))
        for names, stats in stream.statistics(block):
            stats.check(names[0])
            if stream.coupled:
                owners = stream.team.owners(_costs(block, [name for name in names if name in whole]))
            for together in self._pieces(block, names):
                if owners.get(together[0], stream.team.rank) != stream.team.rank:
                    continue
                with tight() if stats.width > SMALL else nullcontext():
                    self._solve(stream.team, block, together, stats)
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if hasattr(callback, "on_linear_end"):
                        for name in together:
                            callback.on_linear_end(trainer, block, name)
            if stream.coupled:
                _exchange(stream.team, block, owners)
        if not stream.coupled:
            _exchange(stream.team, block, owners)

    def _apart(self, name: str) -> bool:
        """Whether the answer for a row of this linear depends on that row alone."""
        return name not in self.answers and rows_apart(self.solver_of(name), self.patterns[name])

    def _alike(self, one: str, other: str) -> bool:
        """Whether two linears of one input can be solved in one call."""
        same = self.patterns[one] == self.patterns[other] and self.solver_of(one) is self.solver_of(other)
        return same and self._apart(one) and self._apart(other)

    def solver_of(self, name: str) -> Callable[..., Tensor]:
        """The solver of a linear."""
        return self.solver if callable(self.solver) else self.solver[name]

    def _pieces(self, block: Block, names: list[str]) -> list[list[str]]:
        """Linears of one input in pieces that are solved in one call: several where rows are apart and few."""
        pieces: list[list[str]] = []
        for name in names:
            size = block.linears[name].weight.numel()
            last = pieces[-1] if pieces else []
            whole = size + sum(block.linears[each].weight.numel() for each in last)
            if last and whole <= TOGETHER and self._alike(name, last[0]):
                last.append(name)
            else:
                pieces.append([name])
        return pieces

    @torch.no_grad()
    def _solve(self, team: Team, block: Block, names: list[str], stats: Norms) -> None:
        """Solve linears that are one piece; where rows are apart, every process takes some, and all get the answer."""
        for name in names:
            if not block.linears[name].weight.isfinite().all():
                raise ValueError(f"the weight of {name} contains NaN or Inf; repair the checkpoint before pruning it")
        dense = [block.linears[name].weight.float() for name in names]
        weight = torch.cat(dense) if len(dense) > 1 else dense[0].contiguous()  # (out, in)
        apart, pattern = self._apart(names[0]), self.patterns[names[0]]
        scale = None if apart or not isinstance(pattern, Unstructured) else pattern.scale(weight)
        rows = team.rows(len(weight)) if apart else slice(0, len(weight))
        torch.manual_seed(self.seed + zlib.crc32(names[0].encode()))
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if names[0] in self.answers:
                solved = self.answers[names[0]]
            else:
                mine = weight[rows] if scale is None else weight * scale
                given = {"init": mine} if self.continues else {}
                solved = self.solver_of(names[0])(mine, stats, pattern, **given) if len(mine) else mine
                if solved.shape == mine.shape and apart:
                    solved = team.join(solved, len(weight))
                elif solved.shape == mine.shape and scale is not None:
                    solved = torch.where(solved == mine, weight, solved / scale)  # what did not change, bit for bit
        seconds = time.perf_counter() - started
        sizes = [len(each) for each in dense] if solved.shape == weight.shape else [len(solved)]
        for place, (name, own, answer) in enumerate(zip(names, dense, solved.split(sizes), strict=False)):
            teller = place % team.size if apart else team.rank
            prune_linear(
                block,
                name,
                answer,
                pattern,
                error=stats.estimate(answer, own) if answer.shape == own.shape and teller == team.rank else None,
                seconds=seconds * len(own) / len(weight),
                warnings=[str(warning.message) for warning in said],
            )
            if apart:
                block.records[name] = team.tell(block.records[name], teller)


def _costs(block: Block, names: list[str]) -> dict[str, float]:
    """Multiply-adds of one product of each linear's weight and its Gram, which all solvers' time follows."""
    return {name: block.linears[name].shape[0] * block.linears[name].shape[1] ** 2 for name in names}


def _exchange(team: Team, block: Block, owners: Mapping[str, int]) -> None:
    """Give every process what each linear's owner solved: the stored weight, the mask and the record."""
    if team.size == 1:
        return
    for name, owner in owners.items():
        parameter = block.linears[name].module.weight.detach()  # type: ignore[operator]
        team.send(parameter.view(torch.uint8), owner)  # bit for bit, whatever the dtype
        mine = owner == team.rank
        mask = block.masks[name] if mine else torch.empty(block.linears[name].shape, dtype=torch.bool)
        mask = mask.to(parameter.device, torch.uint8)
        team.send(mask, owner)
        block.masks[name] = mask.bool().cpu()
        block.records[name] = team.tell(block.records[name] if mine else None, owner)


class Inspect(Callback):
    """Remembers every block before anything changes it: the first callback of a walk, as `Commit` is the last."""

    def __init__(self, inspector: Inspector):
        self.inspector = inspector

    def on_train_batch_start(self, trainer: Trainer, walk: Walk, block: Block | None, batch_idx: int) -> None:  # type: ignore[override]
        """A block comes."""
        if block is not None:
            self.inspector.remember(block)


class Commit(Callback):
    """Puts every finished block on disk, if it is what the stage declares.

    inspector: has remembered the block; None: whatever is there is committed (a walk of one's own, without a stage)
    """

    def __init__(self, commits: Commits, inspector: Inspector | None = None):
        self.commits, self.inspector = commits, inspector

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, walk: Walk, outputs: Any, block: Block | None, batch_idx: int
    ) -> None:
        """Check and commit the block; its masks are on disk then and leave the memory.

        Raises:
            StageError: it is not what the stage declares.
        """
        if block is None:  # a process without a block in the last round
            return
        if self.inspector is not None:
            self.inspector.admit(block, {})
        if walk.stream.team.rank == 0:
            self.commits.commit(block)
        block.masks.clear()
        if may_rest(block):  # in every process: before it is filled again, they meet
            settle(block, self.commits.weights.stored)
