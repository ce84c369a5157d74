"""The stages of a recipe, one after another, on the model in memory; whatever is finished is on disk."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn

from sparsekit.model import Block, adopt
from sparsekit.model.structure import Removal, Units
from sparsekit.recipe import Stage, kind, structural
from sparsekit.results import MASKS, Before, commits_of
from sparsekit.run.context import Work
from sparsekit.run.plan import Plan, configured
from sparsekit.run.together import Together
from sparsekit.system import Meter, Team, meet, write_json
from sparsekit.train import make_loggers
from sparsekit.walk import Commit, Commits, OneShot, Walk, WalkProgress

NOTES = "notes.json"
LAST = "last.ckpt"  # in a stage's `checkpoints`: it goes on from there


@dataclass
class Outcome:
    """What the stages left: the model's blocks with their records, what was cut out of it, and what stages noted.

    cuts: the units of the model before each structural stage, and what it decided
    masks: where the masks of the last stage are that pruned weights; None if none did
    """

    blocks: list[Block]
    cuts: list[tuple[Units, Removal]] = field(default_factory=list)
    masks: Commits | Before | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def tell(self, stage: str, notes: Any) -> None:
        """Keep what a stage noted; one that comes again has its number behind its name."""
        again = sum(name.partition(" ")[0] == stage for name in self.notes)
        self.notes[f"{stage} {again + 1}" if again else stage] = notes


def run_stages(
    planned: Plan, model: nn.Module, tokens: Tensor, output: Path, meter: Meter, console: Console
) -> Outcome:
    """Run the recipe's stages on the model, in place.

    With several processes (`trainer.devices`) all of them call this, and after each stage all have the same model.
    """
    outcome = Outcome(adopt(model, planned.blocks))
    if planned.recipe.from_ and (Path(planned.recipe.from_) / MASKS).is_file():
        outcome.masks = Before(planned.recipe.from_)
        for block in outcome.blocks:
            block.records = outcome.masks.records(block)
    for index, stages in enumerate(planned.segments):
        commits = commits_of(output, index)
        work = Work(
            planned,
            model,
            outcome.blocks,
            tokens,
            output,
            commits,
            meter,
            index=index,
            first=outcome.masks is None,
            before=outcome.masks,
            console=console,
        )
        if structural(stages[0]):
            _remove(outcome, stages, work, console)
            continue
        if len(commits.done()) < len(outcome.blocks):
            _fit(stages, work, console)
        for block in outcome.blocks:
            commits.restore(block)
        if (commits.folder / NOTES).is_file():
            for stage, notes in json.loads((commits.folder / NOTES).read_text(encoding="utf-8")).items():
                outcome.tell(stage, notes)
        outcome.masks = commits
    return outcome


def _remove(outcome: Outcome, stages: list[Stage], work: Work, console: Console) -> None:
    if Removal.read(work.commits.folder) is None:
        _fit(stages, work, console)
    removal = Removal.read(work.commits.folder)
    assert removal is not None
    outcome.cuts.append((removal.apply(work.model, work.blocks), removal))
    outcome.tell(stages[0].name, removal.notes)
    work.planned.refit(work.model)
    outcome.blocks = work.planned.blocks


def _fit(stages: list[Stage], work: Work, console: Console) -> None:
    shutil.rmtree(work.activations, ignore_errors=True)  # of a run that was killed
    loop = kind(stages[0]) == "stage"
    given = work.recipe.trainer.model_dump()
    group = Trainer(**given, logger=False, enable_checkpointing=False)
    given["strategy"] = Together() if group.world_size > 1 else "auto"
    work.team = Team(group.global_rank, group.world_size)
    try:
        with work.meter.stage(stages[0].name if loop else "capture"):
            module, data, own = configured("stages", stages[0])(work) if loop else one_shot(work, stages)
            walk = isinstance(module, Walk)
            trainer = Trainer(
                **{"max_epochs": 1} | given | getattr(module, "trainer_options", {}),
                logger=make_loggers(work.recipe.loggers, work.output, work.index, stages[0].name),
                callbacks=[*own, Commit(work.commits), WalkProgress(console)] if walk else own,
                use_distributed_sampler=False,  # stages share out their data themselves, by work.team
                enable_checkpointing=False,  # committed blocks are the checkpoint; other stages write their own
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            last = work.checkpoints / LAST
            with _interrupts():
                if walk or not last.is_file():
                    trainer.fit(module, data)
                else:
                    trainer.fit(module, data, ckpt_path=last, weights_only=True)
            if walk:
                data.close()
            elif not structural(stages[0]):
                _commit(work)
            meet()  # what others committed is there
    finally:
        shutil.rmtree(work.activations, ignore_errors=True)


@contextmanager
def _interrupts() -> Iterator[None]:
    try:
        yield
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop


def _commit(work: Work) -> None:
    """Commit all blocks of a stage that trains the model as a whole; the masks are those of the stages before."""
    if work.team.rank:
        return
    if work.notes:
        write_json(work.commits.folder / NOTES, work.notes)
    masks = work.masks()
    for block in work.blocks:
        block.to("cpu")
        for name, linear in block.linears.items():
            block.masks[name] = masks[name] if name in masks else torch.ones(linear.shape, dtype=torch.bool)
        work.commits.commit(block)
        block.masks.clear()
    shutil.rmtree(work.checkpoints, ignore_errors=True)


def one_shot(work: Work, stages: list[Stage]) -> tuple[LightningModule, Any, list[Any]]:
    """Layer-wise solvers as what Trainer.fit takes: a walk, its stream, and the callback that solves."""
    stream = work.stream()
    solve = OneShot(work.solver(stages), work.patterns, work.seed, continues=not work.first)
    return Walk(stream), stream, [solve]
