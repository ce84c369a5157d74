"""The contract of a stage, for the one-line test of anybody's."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from sparsekit.contracts import Effect, Fit
from sparsekit.model.structure import Removal
from sparsekit.testing.contexts import begin, context, tiny_model, tiny_tokens
from sparsekit.walk import Commit, Inspect, Inspector, Walk, digests


def check_stage(stage: Callable[..., Any], *, pattern: str = "2:4", tokenizer: Any = None, **options: Any) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `stage` breaks.

    A stage is a function `(context, *, options...) -> Fit` with a docstring, keyword-only options, and an effect by
    `@declares`. On a tiny model it does what it declares and nothing else, which is checked by the same code as in a
    run, and the same twice.

    pattern: that it prunes to. tokenizer: for stages that read text. options: of the stage, such as few steps
    """
    effect = getattr(stage, "effect", None)
    assert effect is not None, "it declares no effect: put @sparsekit.contracts.declares(Effect(...)) above it"
    assert (inspect.getdoc(stage) or "").strip(), "the stage has no docstring"
    parameters = list(inspect.signature(stage).parameters.values())
    assert parameters, "the first parameter is the context"
    for parameter in parameters[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} is not keyword-only"
    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run_stage(stage, Path(folder), pattern, tokenizer, options, tiny_model()))
    assert found[0] == found[1], "two runs on the same model with the same seed gave different results"


def declared_effect(stage: Callable[..., Any], options: dict[str, Any]) -> Effect:
    """What a stage declares that it does with these options."""
    effect: Any = stage.effect  # type: ignore[attr-defined]
    defaults = {p.name: p.default for p in list(inspect.signature(stage).parameters.values())[1:]}
    declared: Effect = effect(defaults | options) if callable(effect) else effect
    return declared


def run_stage(
    stage: Callable[..., Any], folder: Path, pattern: str, tokenizer: Any, options: dict[str, Any], model: nn.Module
) -> dict[str, str]:
    """Run a stage on a tiny model as a recipe would; the digests of what it left."""
    effect = declared_effect(stage, options)
    torch.manual_seed(0)
    here = context(model, tiny_tokens(), folder, pattern=pattern, tokenizer=tokenizer, batch=2)
    if not (effect.cuts or effect.resizes):
        here.commits.prepare(here.blocks)
    inspector = Inspector("the stage", effect, here.patterns)
    inside = {f"{block.name}.{name}" for block in here.blocks for name in block.module.state_dict(keep_vars=True)}
    before = digests(model, inside)
    for block in here.blocks if not effect.cuts else ():
        inspector.remember(block)
    ready = begin(stage, here, **options)
    fits = isinstance(ready, tuple) and len(ready) == 3
    assert fits, "it must return sparsekit.contracts.Fit(module, data, callbacks)"
    module, data, callbacks = Fit(*ready)
    walk = isinstance(module, Walk)
    if walk:
        callbacks = [Inspect(inspector), *callbacks, Commit(here.commits, inspector)]
    trainer = Trainer(
        **{"max_epochs": 1} | getattr(module, "trainer_options", {}),
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if effect.cuts:
        removal = Removal.read(here.commits.folder)
        assert removal is not None, "it declares that it cuts, and decided nothing: end it by context.cutting"
        removal.apply(model, here.blocks)
    elif not walk:
        for block in here.blocks:
            inspector.admit(block, here.earlier(block))
    assert digests(model, inside) == before or effect.cuts, "it changed a tensor outside the blocks"
    return digests(model)
