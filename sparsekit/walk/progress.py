"""Progress of a walk: a rich bar in a terminal, plain lines elsewhere."""

import time
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekit.model import Block
from sparsekit.system import human_size, resident_memory
from sparsekit.walk.findings import mean_error


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


class WalkProgress(Callback):
    """Shows block, linear, error, memory and time left."""

    def __init__(self, console: Console):
        self.console = console
        self.bar: Progress | None = None

    def on_train_start(self, trainer: Any, walk: Any) -> None:
        """Start counting; a resumed walk starts where it was left."""
        self.blocks, self.done = walk.stream.blocks, walk.stream.start
        self.first, self.began = self.done, time.perf_counter()
        if self.done:
            self.console.print(f"{self.done} of {len(self.blocks)} blocks are committed; recomputing what enters next")
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("pruning"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[linear]}  error {task.fields[error]}  {task.fields[memory]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self.bar.start()
            fields = {"linear": "", "error": "-", "memory": ""}
            self.task = self.bar.add_task("", total=len(self.blocks), completed=self.done, **fields)  # type: ignore[arg-type]

    def on_linear_end(self, trainer: Any, block: Block, name: str) -> None:
        """One linear is solved."""
        if self.bar is not None:
            inside = name.removeprefix(f"{block.name}.")
            self.bar.update(
                self.task,
                linear=f"{block.index}.{inside}",
                error=_shown(block.records[name]["error"]),
                memory=human_size(resident_memory()),
            )

    def on_train_batch_end(self, trainer: Any, walk: Any, outputs: Any, block: Block | None, batch_idx: int) -> None:
        """One block is finished."""
        self.done = min(self.done + walk.stream.pace, len(self.blocks))
        if block is None:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            return
        pace = (time.perf_counter() - self.began) / (self.done - self.first)
        self.console.print(
            f"block {self.done}/{len(self.blocks)}  {len(block.records)} linears  "
            f"mean relative error {_shown(mean_error(block))}  memory {human_size(resident_memory())}  "
            f"{pace * (len(self.blocks) - self.done):.0f} s left",
            highlight=False,
        )

    def on_train_end(self, trainer: Any, walk: Any) -> None:
        """Leave the finished bar on the screen."""
        self._stop()

    def on_exception(self, trainer: Any, walk: Any, exception: BaseException) -> None:
        """Give the terminal back before the message."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
