"""The stages of a recipe, one after another, on the model in memory; whatever is finished is on disk."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit import registry
from sparsekit.contracts import Effect, StageError
from sparsekit.model import Block, adopt, filled, may_rest, restore_resized, rests, settle, unsettle
from sparsekit.model.structure import Removal, Units
from sparsekit.recipe import Stage, effect_of, group_of, kind
from sparsekit.results import MASKS, Before, weights_of
from sparsekit.run import plugged
from sparsekit.run.aiming import aimed
from sparsekit.run.allocation import allocate
from sparsekit.run.context import Context
from sparsekit.run.goals import told
from sparsekit.run.methods import configured
from sparsekit.run.one_shot import one_shot
from sparsekit.run.plan import Plan
from sparsekit.run.removing import remove_by
from sparsekit.run.segments import NOTES, RESIZED, commits_of, forget_from, last_whole
from sparsekit.run.selection import found_blocks
from sparsekit.run.shared import Common
from sparsekit.run.together import Sharded, Together, start
from sparsekit.run.zeros import SourceZeros
from sparsekit.system import Meter, bars, commit, committed, meet, write_tensors
from sparsekit.train import last_checkpoint, make_loggers
from sparsekit.walk import Commit, Commits, Inspect, Inspector, Walk, WalkProgress, digests


@dataclass
class Outcome:
    """What the stages left: the model's blocks with their records, what was cut out of it, and what stages noted.

    cuts: the units of the model before each structural stage, and what it decided
    masks: where the masks of the last stage are that pruned weights; None if none did
    written: where the weights are on disk as the last stage left them; None: they are in memory alone
    resized: the stage that changed the width between blocks; empty if none did
    """

    blocks: list[Block]
    cuts: list[tuple[Units, Removal]] = field(default_factory=list)
    masks: Commits | Before | SourceZeros | None = None
    written: Path | None = None
    resized: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def tell(self, stage: str, notes: Any) -> None:
        """Keep what a stage noted; one that comes again has its number behind its name."""
        again = sum(name.partition(" ")[0] == stage for name in self.notes)
        self.notes[f"{stage} {again + 1}" if again else stage] = notes


def run_stages(
    planned: Plan,
    model: nn.Module,
    tokens: Tensor,
    output: Path,
    meter: Meter,
    console: Console,
    bos: int | None = None,
    common: Common | None = None,
) -> Outcome:
    """Run the recipe's stages on the model, in place. bos: the token before every window of further text, if any

    common: see `Context`

    With several processes (`trainer.devices`) all of them call this, and after each stage all have the same model.

    Raises:
        StageError: a stage did something else than it declares; nothing of it was kept.
    """
    outcome = Outcome(adopt(model, planned.blocks))
    recipe = planned.recipe
    if recipe.from_ and (Path(recipe.from_) / MASKS).is_file():
        outcome.masks = Before(recipe.from_)
        for block in outcome.blocks:
            block.records = outcome.masks.records(block)
    patterns = planned.patterns
    team, device = start(recipe.trainer)
    whole = last_whole(planned, output)
    meet()  # nobody changes anything before all have looked
    for index, stages in enumerate(planned.segments):
        commits = commits_of(planned, model, outcome.cuts, output, index, resized=bool(outcome.resized))
        effect = effect_of(stages[-1])  # of solvers that share a walk, the last has the last word
        if outcome.masks is None and effect.moves and not (effect.prunes or effect.cuts or effect.resizes):
            _hold_zeros(outcome, recipe.masks, called(stages[0]), console)
        context = Context(
            model,
            outcome.blocks,
            tokens,
            output,
            patterns=patterns,
            device=device,
            seed=recipe.seed,
            error_correction=recipe.error_correction,
            batch=planned.batch,
            activations=planned.memory[0],
            statistics=planned.memory[1],
            commits=commits,
            index=index,
            before=outcome.masks,
            load_dense=planned.source.dense,
            load_tokenizer=planned.source.tokenizer,
            calibration=planned.calibration,
            base=planned.source.name,
            bos=bos,
            meter=meter,
            team=team,
            sharded=recipe.trainer.strategy == "fsdp",
            common=common,
            console=console,
        )
        if effect.resizes or effect.cuts:
            outcome.written = None
            if effect.resizes:
                _resize(outcome, planned, stages[0], effect, context)
            else:
                _cut(outcome, planned, stages[0], effect, context)
                patterns = allocate(recipe, outcome.blocks)
            continue
        if index >= whole and len(commits.done()) < len(outcome.blocks):
            forget_from(planned, context.output, context.team, index + 1)
            if team.rank == 0:
                commits.prepare(outcome.blocks)
            meet()
            if team.rank:
                commits.look_again()
            _run(planned, stages, effect, context)
        for block in outcome.blocks:
            if index < whole:
                commits.recall(block)  # later weights are on disk
            else:
                commits.restore(block)
        outcome.written = commits.weights.folder
        meet()  # nobody moves weights that another still reads
        if index >= whole and team.rank == 0:
            for earlier in range(index):
                shutil.rmtree(weights_of(output, earlier), ignore_errors=True)
        if committed(commits.folder / NOTES):
            for stage, notes in json.loads((commits.folder / NOTES).read_text(encoding="utf-8")).items():
                outcome.tell(stage, notes)
        if effect.prunes or outcome.masks is not None:  # else nobody has pruned anything
            outcome.masks = commits
    return outcome


def _hold_zeros(outcome: Outcome, asked: str, stage: str, console: Console) -> None:
    """Before weights are trained: the zeros that the source came with are held, or it is said that they are not."""
    found = SourceZeros(outcome.blocks)
    if not found:
        return
    said = f"the source is {found.share:.1%} sparse ({len(found.patterns)} linears)"
    if asked == "none":
        console.print(f"{said}: masks is none, so {stage} makes it dense again", highlight=False, markup=False)
        return
    console.print(f"{said}: its zeros are kept", highlight=False, markup=False)
    outcome.masks = found
    outcome.tell("source", {"sparsity": found.share, "linears": len(found.patterns), "zeros": "kept"})
    for block in outcome.blocks:
        block.records = found.records(block)


def called(stage: Stage) -> str:
    """A stage and its package, for messages."""
    return f"`{stage.name}` of {registry.package(registry.find(group_of(stage), stage.name))}"


def _cut(outcome: Outcome, planned: Plan, stage: Stage, effect: Effect, context: Context) -> None:
    if Removal.read(context.commits.folder) is None:
        forget_from(planned, context.output, context.team, context.index + 1)
        _run(planned, [aimed(stage, planned, context, outcome.cuts)], effect, context)
    removal = Removal.read(context.commits.folder)
    if removal is None:
        raise StageError(f"{called(stage)} declares that it cuts, and decided nothing: end it by `context.cutting`")
    unsettle(context.blocks)
    outcome.cuts.append((removal.apply(context.model, context.blocks), removal))
    outcome.tell(stage.name, removal.notes | told(context.commits.folder))
    outcome.blocks = found_blocks(planned.recipe, context.model)  # of what is left


def _resize(outcome: Outcome, planned: Plan, stage: Stage, effect: Effect, context: Context) -> None:
    """Run a stage that makes other modules of the blocks; what it made is committed whole, and rebuilt on a resume."""
    function, file = registry.load("stages", stage.name), context.commits.folder / RESIZED
    unsettle(context.blocks)
    if committed(file):
        restore_resized(context.model, load_file(file), function)
    else:
        forget_from(planned, context.output, context.team, context.index + 1)
        with context.meter.stage(stage.name), _frozen(context.model, effect):
            if configured("stages", stage)(context) is not None:
                raise StageError(f"{called(stage)} resizes the model, so it works when it is called and returns None")
        context.model.to("cpu")
        tensors = {name: tensor.detach().contiguous() for name, tensor in context.model.state_dict().items()}
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise StageError(f"{called(stage)} left NaN or Inf in {bad[0]}; nothing of it was kept")
        commit(file, lambda aside: write_tensors(aside, tensors))
    outcome.resized = stage.name
    if stage.name in context.notes:
        outcome.tell(stage.name, context.notes[stage.name])


def _run(planned: Plan, stages: list[Stage], effect: Effect, context: Context) -> None:
    """Run one segment, and have everything that it left checked against its effect and committed."""
    shutil.rmtree(context.scratch, ignore_errors=True)  # of a run that was killed
    name = "capture" if kind(stages[0]) == "solver" else stages[0].name
    together = [] if effect.walks else context.blocks  # who does not go from block to block is given all of them
    outside = _outside(context)

    def check_outside() -> None:
        after = _outside(context)
        if changed := {name for name in outside.keys() | after.keys() if outside.get(name) != after.get(name)}:
            context.commits.forget()  # a walk that is found out at its end
            raise StageError(f"{called(stages[0])} changed {min(changed)}, which is outside the blocks")

    try:
        with context.meter.stage(name), _frozen(context.model, effect), filled(together):
            if kind(stages[0]) == "criterion":
                remove_by(stages[0], context)
            else:
                _fit(planned, stages, effect, context, check_outside)
            check_outside()
            meet()  # what others committed is there
    finally:
        shutil.rmtree(context.scratch, ignore_errors=True)


def _outside(context: Context) -> dict[str, str]:
    """The digests of all tensors outside the blocks, by name."""
    inside = {f"{block.name}.{name}" for block in context.blocks for name in block.module.state_dict(keep_vars=True)}
    return digests(context.model, inside)


def _fit(
    planned: Plan, stages: list[Stage], effect: Effect, context: Context, check_outside: Callable[[], None]
) -> None:
    inspector = Inspector(called(stages[0]), effect, context.patterns)
    if kind(stages[0]) == "solver":
        ready = one_shot(context, stages)
    else:
        for block in context.blocks if not effect.cuts else ():
            if not rests(block):
                inspector.remember(block)  # before the stage touches the model; a walk does so again, block by block
        ready = configured("stages", stages[0])(context)
    if ready is None:
        raise StageError(f"{called(stages[0])} gave nothing to fit; return sparsekit.contracts.Fit(module, data)")
    module, data, callbacks = ready
    walk = isinstance(module, Walk)
    if walk:
        callbacks = [Inspect(inspector), *callbacks, Commit(context.commits, inspector), WalkProgress(context.console)]
    asked = planned.recipe.trainer
    given = {"accelerator": asked.accelerator, "devices": asked.devices, "num_nodes": asked.num_nodes, "max_epochs": 1}
    shares = context.sharded and getattr(module, "sharding", None) is not None
    together = Sharded(context.team.size) if shares else Together() if context.team.size > 1 else "auto"
    given |= {"strategy": together} | getattr(module, "trainer_options", {})
    if effect.gradients and not walk:  # a stage that trains the model as a whole
        wanted = {"precision": asked.precision, "gradient_clip_val": asked.gradient_clip_val}
        given |= {key: value for key, value in wanted.items() if value is not None}
    curves = make_loggers(planned.recipe.loggers, context.output, context.index, stages[0].name)
    callbacks = [*callbacks, *plugged.callbacks(asked)]
    trainer = Trainer(
        **given,
        logger=curves + plugged.loggers(asked),
        callbacks=callbacks,
        use_distributed_sampler=False,  # stages share out their data themselves, by context.team
        enable_checkpointing=False,  # committed blocks are the checkpoint; other stages write their own
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),  # a stage's own, or a user's
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    last = None if walk else last_checkpoint(context.checkpoints, context.team if shares else None)
    with _interrupts(), bars(False):  # a stage shows its own
        if last is None:
            trainer.fit(module, data)
        else:
            trainer.fit(module, data, ckpt_path=last, weights_only=True)
    if walk:
        data.close()
    elif not effect.cuts:
        check_outside()
        _commit(context, inspector)


@contextmanager
def _interrupts() -> Iterator[None]:
    try:
        yield
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop


@contextmanager
def _frozen(model: nn.Module, effect: Effect) -> Iterator[None]:
    """While this lasts, the model has no gradients of its own unless the stage declares that it needs them."""
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if not effect.gradients:
        model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked.get(name, True))


def _commit(context: Context, inspector: Inspector) -> None:
    """Check and commit all blocks of a stage that worked on the model as a whole."""
    for block in context.blocks:
        block.to("cpu")
        earlier = context.earlier(block)
        inspector.admit(block, earlier)
        for name, linear in block.linears.items():
            if name not in block.masks:  # nobody pruned it, or a stage before did
                block.masks[name] = earlier.get(name, torch.ones(linear.shape, dtype=torch.bool))
    if context.team.rank:
        return
    if context.notes:
        said = json.dumps(context.notes, indent=1)
        commit(context.commits.folder / NOTES, lambda aside: aside.write_text(said, encoding="utf-8"))
    for block in context.blocks:
        context.commits.commit(block)
        block.masks.clear()
        if may_rest(block):
            settle(block, context.commits.weights.stored)
    shutil.rmtree(context.checkpoints, ignore_errors=True)
