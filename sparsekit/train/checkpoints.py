"""Checkpoints of a stage that trains: the last one and the one before it, each with its digest."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from sparsekit.system import Team, commit, committed, move

PAUSE = 30.0  # seconds between checkpoints at least, and as many times what writing one took
LAST, BEFORE = "last.ckpt", "before.ckpt"


class Checkpoints(Callback):
    """Writes `last.ckpt` after a step of the optimizer: what is trained, its moments and the best state so far.

    team: each process of it writes a checkpoint of its own, of its share; None: the first writes that of all

    Seldom enough that writing takes a small share of the time; when it was written does not change the result. Comes
    after `Best` in the list of callbacks, so that what it saves has been looked at. The one before is kept, so that
    there is one to go on from whatever happens to the last.
    """

    def __init__(self, folder: Path, pause: float = PAUSE, team: Team | None = None):
        self.folder, self.pause, self.each = (
            folder if team is None else own_folder(folder, team),
            pause,
            team is not None,
        )
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
        aside, last = self.folder / ".saving.ckpt", self.folder / LAST
        with _temporary_files_in(self.folder):
            trainer.save_checkpoint(aside)  # all processes take part, the first writes
        if trainer.is_global_zero or self.each:
            if committed(last):
                move(last, self.folder / BEFORE)
            commit(last, lambda path: aside.rename(path))
        self.written = time.perf_counter()
        self.took = self.written - began


def last_checkpoint(folder: Path, team: Team | None = None) -> Path | None:
    """The last checkpoint in a folder that is intact; None: a stage begins at its beginning.

    team: each process of it has its own, and all take those of the same step
    """
    if team is None:
        return next((folder / name for name in (LAST, BEFORE) if committed(folder / name)), None)
    mine = {}
    for file in (own_folder(folder, team) / name for name in (BEFORE, LAST)):
        if committed(file):
            mine[int(torch.load(file, map_location="cpu", mmap=True, weights_only=True)["global_step"])] = file
    common = set.intersection(*(set(team.tell(list(mine), rank)) for rank in range(team.size)))
    return mine[max(common)] if common else None


def own_folder(folder: Path, team: Team) -> Path:
    """Where a process keeps its share; other numbers of processes have other shares."""
    return folder / f"{team.rank + 1}-of-{team.size}"


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Lightning writes a checkpoint to a temporary file first, which must not lie on another, fuller disk."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
