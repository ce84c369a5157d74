"""How a structural stage ends: units are chosen by their scores, made up for, checked and committed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sparsekit.contracts import Decision
from sparsekit.model.structure import Removal, Units, choose
from sparsekit.walk.commits import Commits
from sparsekit.walk.least_squares import compensate
from sparsekit.walk.stream import BlockStream


class Cutting:
    """What is to be removed, and what follows a decision: `finish` chooses, makes up, checks and commits.

    units: that compete; remove: the share of the blocks' parameters that goes
    stream: makes the stream that least squares walk over; None: nothing is made up for by least squares
    bias: biases make up too, those of least squares or else the criterion's own; damping: of least squares
    leads: whether this process writes
    options: shape, budgets, least of `choose`, checked at once

    Raises:
        ValueError: the units cannot give up so much, or options that do not go together.
    """

    def __init__(
        self,
        units: Units,
        commits: Commits,
        *,
        remove: float,
        stream: Callable[[], BlockStream] | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        damping: float = 0.01,
        bias: bool = False,
        leads: bool = True,
        **options: Any,
    ):
        self.units, self.commits, self.remove, self.stream, self.device = units, commits, remove, stream, device
        self.damping, self.bias, self.leads, self.options = damping, bias, leads, options
        choose(units, torch.zeros(len(units)), remove, **options)  # so that it is said now, not at the end

    def finish(self, decision: Decision) -> None:
        """Commit what goes and what was changed to make up for it; the run cuts the model then.

        Raises:
            ValueError: scores or mask are of another shape or not finite, or less goes than was asked.
        """
        units, notes, scores = self.units, dict(decision.notes), decision.scores.detach().cpu()
        if scores.shape != (len(units),) or not scores.isfinite().all():
            raise ValueError(f"there must be a finite score for each of {len(units)} units")
        kept = choose(units, scores, self.remove, **self.options) if decision.kept is None else decision.kept
        if kept.shape != (len(units),) or kept.dtype != torch.bool:
            raise ValueError(
                f"a decision is a bool for each of {len(units)} units, not {kept.dtype} {tuple(kept.shape)}"
            )
        if units.removed(kept) < self.remove - 1e-6:
            raise ValueError(f"{units.removed(kept):.2%} of the blocks' parameters go, {self.remove:.2%} were asked")
        changed: dict[str, Tensor] = {}
        if self.stream is not None:
            started = time.perf_counter()
            stream = self.stream()
            stream.move(self.device)
            changed = compensate(stream, units, kept, damping=self.damping, bias=self.bias)
            stream.close()
            notes["compensation_seconds"] = round(time.perf_counter() - started, 3)
        elif self.bias and decision.biases is not None:
            changed = decision.biases(kept)
        outputs = {part.output for part in units.parts}
        for name, tensor in changed.items():
            if name.rpartition(".")[0] not in outputs or not tensor.isfinite().all():
                raise ValueError(f"what makes up for units is in their output linears and finite, not {name}")
        notes["removed"] = units.removed(kept)
        if self.leads:
            Removal(units.kinds, kept, changed, scores, notes).write(self.commits.folder)


class Remove(Callback):
    """When training ends, `module.scores` (units,) decide; `module.notes` go into the report."""

    def __init__(self, cutting: Cutting):
        self.cutting = cutting

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Choose, make up, commit."""
        scores: Any = module.scores
        self.cutting.device = module.device
        self.cutting.finish(Decision(scores, notes=dict(getattr(module, "notes", {}))))
        trainer.strategy.barrier()
