"""What a run has on disk of its segments: decisions, masks and records, and the weights that they left."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from sparsekit.model import Weights, weights_in
from sparsekit.model.structure import Cuts, Removal, Shape
from sparsekit.recipe import effect_of
from sparsekit.results import MODEL, state_of, weights_of
from sparsekit.run.plan import Plan
from sparsekit.system import Team, committed
from sparsekit.walk import Commits

NOTES = "notes.json"
RESIZED = "resized.safetensors"  # the whole model after a stage that changed its width


def last_whole(planned: Plan, output: Path) -> int:
    """The last segment whose weights are all on disk, with the decisions, masks and records up to it; -1: none.

    What comes before it is not needed any more, and may be gone.
    """
    found = -1
    for index, stages in enumerate(planned.segments):
        effect, folder = effect_of(stages[-1]), state_of(output, index)
        if effect.cuts:
            there = Removal.read(folder) is not None
        elif effect.resizes:
            there = committed(folder / RESIZED)
        else:
            commits = Commits(folder, Weights(_where(planned, output, index), None))
            there = commits.recorded()
            found = index if there and commits.whole() else found
        if not there:
            break
    return found


def _where(planned: Plan, output: Path, index: int) -> Path:
    """The folder of a segment's weights: the last one's becomes model/ when all of it is there."""
    folder = weights_of(output, index)
    last = index == len(planned.segments) - 1
    return output / MODEL if last and not folder.is_dir() and (output / MODEL).is_dir() else folder


def commits_of(planned: Plan, model: nn.Module, cuts: Cuts, output: Path, index: int, *, resized: bool) -> Commits:
    """Where what a segment leaves is committed.

    cuts: what was cut out so far; resized: whether a stage has changed the width between blocks
    """
    folder = _where(planned, output, index)
    if resized or not (shape := shape_of(planned, model, cuts)):
        weights = Weights(folder, model, original=not resized)
    else:
        weights = weights_in(folder, model, shape)
    commits = Commits(state_of(output, index), weights)
    if folder.name == MODEL and not commits.whole():  # it is something else, or damaged: it stays until it is replaced
        weights.folder = weights_of(output, index)
        commits.look_again()
    return commits


def forget_from(planned: Plan, output: Path, team: Team, first: int) -> None:
    """Remove what segments from this one on left: it came from weights that are made again. The first process does."""
    for index in range(first, len(planned.segments) if team.rank == 0 else first):
        shutil.rmtree(weights_of(output, index), ignore_errors=True)
        shutil.rmtree(state_of(output, index), ignore_errors=True)


def shape_of(planned: Plan, model: nn.Module, cuts: Cuts, changed: Iterable[str] = ()) -> Shape | None:
    """The shape of a model that structures were cut out of, by these stages or before the run; None: of a whole one."""
    before = Shape.read(planned.folder)
    return Shape.of(model, cuts, before=before, changed=changed) if cuts or before is not None else None
