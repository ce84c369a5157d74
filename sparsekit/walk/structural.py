"""How a structural stage ends: units are chosen by their scores, made up for, cut out of the model, committed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from sparsekit.model.structure import Removal, Units, choose
from sparsekit.walk.commits import Commits
from sparsekit.walk.least_squares import compensate
from sparsekit.walk.stream import BlockStream


class Remove(Callback):
    """When training ends, `module.scores` (units,) decide; what was decided is committed and the pipeline cuts.

    A module that decides by itself has `kept` (units,), which wins, and `changed`, parameters it changed (see
    `Removal`). `module.notes` go into the report.

    stream: makes the stream that `compensate` walks over; None: nothing is made up for
    options: shape, budgets, least of `choose`; damping, bias of `compensate`
    """

    def __init__(
        self,
        units: Units,
        commits: Commits,
        *,
        remove: float,
        stream: Callable[[], BlockStream] | None = None,
        damping: float = 0.01,
        bias: bool = False,
        leads: bool = True,
        **options: Any,
    ):
        self.units, self.commits, self.remove, self.stream = units, commits, remove, stream
        self.damping, self.bias, self.leads, self.options = damping, bias, leads, options

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Choose, make up, commit."""
        scores: Tensor | None = getattr(module, "scores", None)
        kept: Tensor | None = getattr(module, "kept", None)
        if kept is None:
            assert scores is not None
            scores = scores.detach().cpu()
            kept = choose(self.units, scores, self.remove, **self.options)
        changed: dict[str, Tensor] = dict(getattr(module, "changed", {}))
        notes = dict(getattr(module, "notes", {}))
        if self.stream is not None:
            started = time.perf_counter()
            stream = self.stream()
            stream.device = module.device
            changed |= compensate(stream, self.units, kept, damping=self.damping, bias=self.bias)
            stream.close()
            notes["compensation_seconds"] = round(time.perf_counter() - started, 3)
        notes["removed"] = self.units.removed(kept)
        if self.leads:
            Removal(self.units.kinds, kept, changed, scores, notes).write(self.commits.folder)
        trainer.strategy.barrier()


class Once(LightningModule):
    """A structural method without a loop: one step, in which `score(device)` gives the units' scores (units,).

    It may return a mapping instead: scores, kept, changed, notes, as `Remove` reads them.
    """

    def __init__(self, score: Callable[[torch.device], Tensor | dict[str, Any]]):
        super().__init__()
        self.score = score
        self.notes: dict[str, Any] = {}

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""
        return

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Find the scores."""
        found = self.score(self.device)
        for name, value in (found if isinstance(found, dict) else {"scores": found}).items():
            setattr(self, name, value)
        return torch.zeros((), device=self.device, requires_grad=True)

    @staticmethod
    def data() -> DataLoader[Tensor]:
        """One step."""
        return DataLoader(torch.zeros(1, 1))  # type: ignore[arg-type]
