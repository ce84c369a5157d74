"""The stages of a recipe, one after another, on the model in memory; every finished block is on disk."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn

from sparsekit import folder, parallel
from sparsekit.blocks import Block, adopt
from sparsekit.plan import Plan, configured
from sparsekit.progress import WalkProgress
from sparsekit.recipe import Stage, kind
from sparsekit.report import Meter
from sparsekit.team import Team
from sparsekit.walk import Commit, OneShot, Walk
from sparsekit.work import Work


def prune(planned: Plan, model: nn.Module, tokens: Tensor, output: Path, meter: Meter, console: Console) -> list[Block]:
    """Run the recipe's stages; returns the model's blocks with their records. Their masks are in the last commits.

    With several processes (`trainer.devices`) all of them call this, and all but the first have only what they
    themselves pruned at the end.
    """
    blocks = adopt(model, planned.blocks)
    for index, stages in enumerate(planned.segments):
        commits = folder.commits(output, index)
        if len(commits.done()) < len(blocks):
            _fit(stages, Work(planned, model, blocks, tokens, output, commits, meter, first=index == 0), console)
        if parallel.rank() == 0:
            for block in blocks:
                commits.restore(block)
    return blocks


def _fit(stages: list[Stage], work: Work, console: Console) -> None:
    options = work.recipe.trainer.model_dump()
    several = Trainer(**options, logger=False, enable_checkpointing=False).world_size > 1
    trainer = Trainer(
        **options,
        strategy=parallel.Together() if several else "auto",
        max_epochs=1,
        logger=CSVLogger(work.output, name="", version="", flush_logs_every_n_steps=1),
        enable_checkpointing=False,  # committed blocks are the checkpoint
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    work.team = Team(trainer.global_rank, trainer.world_size)
    shutil.rmtree(work.activations, ignore_errors=True)  # of a run that was killed
    loop = kind(stages[0]) == "stage"
    try:
        with work.meter.stage(stages[0].name if loop else "capture"):
            walk, stream, own = configured("stages", stages[0])(work) if loop else one_shot(work, stages)
            trainer.callbacks += [  # type: ignore[attr-defined]
                *own,
                Commit(work.commits),
                WalkProgress(console),
            ]
            try:
                trainer.fit(walk, stream)
            except SystemExit as stop:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from stop
            stream.close()
    finally:
        shutil.rmtree(work.activations, ignore_errors=True)


def one_shot(work: Work, stages: list[Stage]) -> tuple[Walk, Any, list[Any]]:
    """Layer-wise solvers as what Trainer.fit takes: a walk, its stream, and the callback that solves."""
    stream = work.stream()
    solve = OneShot(work.solver(stages), work.patterns, work.seed, continues=not work.first)
    return Walk(stream), stream, [solve]
