"""Checkpoints of a stage that trains: the last one and the one before it, each with its digest."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from sparsekit.system import Team, commit, committed, forget

PAUSE = 30.0  # seconds between checkpoints at least, and as many times what writing one took
KEPT = 2  # checkpoints: the last, and one to go on from whatever happens to it


class Checkpoints(Callback):
    """Writes N.ckpt after step N of the optimizer: what is trained, its moments and the best state so far.

    team: each process of it writes a checkpoint of its own, of its share; None: the first writes that of all

    Seldom enough that writing takes a small share of the time; when it was written does not change the result. Comes
    after `Best` in the list of callbacks, so that what it saves has been looked at. The one before is kept too.
    """

    def __init__(self, folder: Path, pause: float = PAUSE, team: Team | None = None):
        self.folder, self.pause, self.each = own_folder(folder, team), pause, team is not None
        self.written, self.took = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Write it if it is time."""
        due = time.perf_counter() - self.written >= max(self.pause, PAUSE * self.took)
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.should_stop or not due:
            return
        began = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / ".saving.ckpt"
        with _temporary_files_in(self.folder):
            trainer.save_checkpoint(aside)  # all processes take part, the first writes
        if trainer.is_global_zero or self.each:
            commit(self.folder / f"{trainer.global_step}.ckpt", lambda path: aside.rename(path))
            for file in _written(self.folder)[:-KEPT]:
                forget(file)
        self.written = time.perf_counter()
        self.took = self.written - began


def last_checkpoint(folder: Path, team: Team | None = None) -> Path | None:
    """The last checkpoint in a folder that is intact; None: a stage begins at its beginning.

    team: each process of it has its own, and all take those of the same step
    """
    mine = {int(file.stem): file for file in _written(own_folder(folder, team)) if committed(file)}
    steps = set(mine)
    for rank in range(team.size if team else 0):
        steps &= set(team.tell(list(mine), rank))  # type: ignore[union-attr]
    return mine[max(steps)] if steps else None


def own_folder(folder: Path, team: Team | None) -> Path:
    """Where a process of a team keeps its share; other numbers of processes have other shares."""
    return folder if team is None else folder / f"{team.rank + 1}-of-{team.size}"


def _written(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.ckpt"), key=lambda file: int(file.stem))


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Lightning writes a checkpoint to a temporary file first, which must not lie on another, fuller disk."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
