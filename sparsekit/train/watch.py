"""Callbacks of a recovery: the best state by validation loss, small checkpoints, progress."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from sparsekit.system import human_size, resident_memory
from sparsekit.train.recovery import Recovery
from sparsekit.train.rows import Rows
from sparsekit.train.sharded import local
from sparsekit.train.step import Progress

PAUSE = 30.0  # seconds between checkpoints at least, and as many times what writing one took
Step = tuple[int, float | None, float | None]  # step, training loss, validation loss


class Best(Callback):
    """Validates before the first step, `checks` times on the way and at the end, and keeps the best state.

    patience: checks without a better state after which training ends; None for never
    finish: called at the end, when the best state is in the model again
    note: what is to be known of it all, complete by then

    The state before the first step is a candidate too, so nothing ends worse than it began on the validation rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch: int,
        checks: int,
        patience: int | None,
        finish: Callable[[], Any],
        note: dict[str, Any],
    ):
        self.rows, self.batch, self.checks = rows, batch, checks
        self.finish, self.note = finish, note
        self.curve: list[Step] = []
        self.state: dict[str, Tensor] = {}  # the best so far, on the CPU
        self.progress = Progress(patience)
        self.step, self.seconds = 0, 0.0

    def on_train_start(self, trainer: Trainer, module: Recovery) -> None:  # type: ignore[override]
        """Where it begins; after a resume, what was logged before is logged again.

        Raises:
            ValueError: the loss is not finite before any training.
        """
        self.began = time.perf_counter()
        if self.curve:
            for known in self.curve:
                _log(trainer, known)
            return
        self._look(trainer, module, None)
        if not math.isfinite(self.progress.best):
            raise ValueError("the model's loss on the validation text is not finite, so it cannot be trained")

    def on_train_batch_end(self, trainer: Trainer, module: Recovery, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """After a step of the optimizer: log it, validate if it is time, end the training if that is no use."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss, step = module.mean_loss(), trainer.global_step
        if not math.isfinite(loss):
            warnings.warn(f"training diverged at step {step} and was ended; the best state is kept", stacklevel=2)
            trainer.should_stop = True
        elif _due(step, module.steps, self.checks):
            self._look(trainer, module, loss)
            trainer.should_stop |= self.progress.over
        else:
            self._add(trainer, (step, loss, None))

    def _look(self, trainer: Trainer, module: Recovery, loss: float | None) -> None:
        validated = module.validate(self.rows, self.batch)
        self._add(trainer, (trainer.global_step, loss, validated))
        if self.progress.better(validated):
            self.step = trainer.global_step
            self.state = {name: local(leaf.detach()).to("cpu", copy=True) for name, leaf in module.leaves.items()}
        module.switch(True)  # a checkpoint of this very step must hold what is trained, not what was validated

    def _add(self, trainer: Trainer, now: Step) -> None:
        self.curve.append(now)
        _log(trainer, now)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, module: Recovery) -> None:  # type: ignore[override]
        """Put the best state into the model."""
        for name, leaf in module.leaves.items():
            local(leaf).copy_(self.state[name])
        self.state = {}
        self.note |= {
            "before": self.curve[0][2],
            "after": self.progress.best,
            "best_step": self.step,
            "steps": trainer.global_step,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "curve": [list(known) for known in self.curve],
        }
        self.finish()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        known = {key: getattr(self, key) for key in ("curve", "state", "step")}
        known |= {"best": self.progress.best, "waited": self.progress.waited}
        return known | {"seconds": self.seconds + time.perf_counter() - self.began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the interrupted run knew."""
        known = dict(state_dict)
        self.progress.best, self.progress.waited = known.pop("best"), known.pop("waited")
        vars(self).update(known)


def _due(step: int, steps: int, checks: int) -> bool:
    """Whether one of `checks` evenly spread ones falls on this step, the last of them on the last."""
    near = step * checks // steps
    return any(1 <= part <= checks and round(steps * part / checks) == step for part in range(near - 1, near + 3))


def _log(trainer: Trainer, known: Step) -> None:
    step, loss, validated = known
    said = {"train_loss": loss, "validation_loss": validated}
    for logger in trainer.loggers:
        logger.log_metrics({key: value for key, value in said.items() if value is not None}, step=step)


class RecoveryProgress(Callback):
    """Shows step, losses, memory, tokens a second and time left. tokens: of a step. Comes after `Best`."""

    def __init__(self, console: Console, best: Best, tokens: int):
        self.console, self.best, self.tokens = console, best, tokens
        self.bar: Bar | None = None

    def on_train_start(self, trainer: Trainer, module: Recovery) -> None:  # type: ignore[override]
        """Start counting; a resumed run starts where it was left."""
        self.first, self.began = trainer.global_step, time.perf_counter()
        self.said = self.began
        self.console.print(
            f"validation loss {self._last():.4f} at step {self.first} of {module.steps}", highlight=False
        )
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=module.steps, completed=self.first, said="")

    def on_train_batch_end(self, trainer: Trainer, module: Recovery, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """A step: the bar moves, or there is a line where it was validated or the last one is half a minute ago."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self.best.curve:
            return
        step, loss, validated = self.best.curve[-1]
        pace = (time.perf_counter() - self.began) / max(1, step - self.first)
        said = f"loss {loss or math.nan:.4f}  validation {self._last():.4f}  {self.tokens / pace:.0f} tokens/s"
        said += f"  {human_size(resident_memory())}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, said=said)
        elif validated is not None or time.perf_counter() - self.said >= PAUSE:
            self.said = time.perf_counter()
            left = pace * (module.steps - step)
            self.console.print(f"step {step}/{module.steps}  {said}  {left:.0f} s left", highlight=False)

    def _last(self) -> float:
        return next((validated for *_, validated in reversed(self.best.curve) if validated is not None), math.nan)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Leave the finished bar on the screen."""
        self._stop()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        """Give the terminal back before the message."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
