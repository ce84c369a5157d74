"""What `lora` and `finetune` share: text, precision, checkpointed activations, and the parts Trainer.fit takes."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from sparsekit.contracts import Context, Fit
from sparsekit.data import SQUARE, check_length, positions_of
from sparsekit.model import Block, patches, sees_images
from sparsekit.train.checkpoints import Checkpoints
from sparsekit.train.features import FeatureObjective, picture_rows
from sparsekit.train.losses import Objective
from sparsekit.train.recovery import Recovery
from sparsekit.train.rows import Batches, Rows, keeps_apart, training_rows
from sparsekit.train.rows import check_training_source as check_source
from sparsekit.train.sharded import Sharding
from sparsekit.train.teacher import Cached, Running
from sparsekit.train.watch import Best, RecoveryProgress

LENGTH = 512  # tokens of a row, or the model's positions if they are fewer
CLIP = 1.0  # largest norm of a gradient
HALF = (torch.float16, torch.bfloat16)


def check_distillation(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a recovery that do not go together."""
    if options["cache"] and options["hidden"]:
        raise ValueError("cache keeps the dense model's logits alone; leave it 0 where `hidden` is above 0")
    of_text = [name for name in ("distill", "hidden", "cache", "length") if options[name]]
    if options["labels"] and of_text:
        raise ValueError(f"labels are of images, and {', '.join(of_text)} of text: leave one of the two out")


def recovery_reads(options: Mapping[str, Any]) -> tuple[Literal["text", "images"], ...]:
    """What a recovery with these options can be given: losses of logits and rows of a length are of text alone."""
    if options["labels"]:
        return ("images",)
    of_text = options["distill"] or options["hidden"] or options["cache"] or options["length"] is not None
    return ("text",) if of_text else ("text", "images")


@dataclass(frozen=True)
class Text:
    """What a recovery reads: the batches of all its steps, and the rows that choose the best state."""

    batches: Batches
    validation: Rows
    steps: int
    accumulate: int
    length: int  # tokens of a row, or places of an image

    @property
    def tokens(self) -> int:
        """Of one step, over all processes."""
        return self.accumulate * self.batches.batch * self.batches.team.size * self.length


def recovery_text(
    context: Context,
    *,
    source: str | Mapping[str, Any] | None,
    tokens: int,
    steps: int | None,
    length: int | None,
    batch: int,
    accumulate: int,
    validation: float,
    labels: float = 0.0,
) -> Text:
    """The text of a recovery, or the images; source None: the recipe's calibration text.

    Raises:
        ValueError: text, tokenizer and model do not fit each other, or `tokens` are less than one step.
    """
    if sees_images(context.model):
        places = patches(context.model, context.calibration.get("side", SQUARE))
        wide = batch * accumulate * context.team.size
        steps = _steps(tokens, wide, places) if steps is None else steps
        images, held_out = picture_rows(context, check_source(source), validation, labelled=labels > 0)
        batches = Batches(images, count=steps * accumulate, batch=batch, seed=context.seed, team=context.team)
        return Text(batches, held_out, steps, accumulate, places)
    config: Any = context.model.config
    positions = positions_of(config)
    check_length(length or 1, positions, "recovery")
    length = length or min(LENGTH, positions or LENGTH)
    wide = batch * accumulate * context.team.size
    steps = _steps(tokens, wide, length) if steps is None else steps
    settings = check_source(source) or context.calibration
    if not settings:
        raise ValueError("the calibration text came as tokens or texts, and recovery needs more: give it a `source`")
    apart = keeps_apart(context.model)  # type: ignore[arg-type]
    training, held_out = training_rows(
        settings,
        context.tokenizer(),
        length=length,
        rows=steps * wide,
        validation=validation,
        seed=context.seed,
        first=context.bos,
        together=apart,
    )
    if training.positions is not None:
        kind = type(context.model).__name__
        context.console.print(
            "records share rows; positions that begin again keep them from attending to one another"
            if apart
            else f"every record has a row of its own, filled up: in {kind} positions do not keep records apart",
            markup=False,
        )
    if int(training.ids.max()) >= (vocabulary := config.get_text_config().vocab_size):
        raise ValueError(f"the tokenizer gives token {int(training.ids.max())}, but the model embeds {vocabulary}")
    batches = Batches(training, count=steps * accumulate, batch=batch, seed=context.seed, team=context.team)
    return Text(batches, held_out, steps, accumulate, length)


def _steps(tokens: int, wide: int, length: int) -> int:
    """Steps that read so many tokens. wide: rows of a step; length: tokens of a row, or patches of an image."""
    if tokens < wide * length:
        raise ValueError(
            f"tokens is {tokens}, less than the {wide * length} of one step ({wide} rows of {length}): give more "
            "tokens, or a smaller batch or length"
        )
    return tokens // (wide * length)


class Stored:
    """A model's parameters as they were stored, while it is trained: what they were is what they become again.

    wide: it computes in float32 meanwhile. Otherwise half precision stays what it is, beside float32 leaves.
    narrow: parameters that stay what they are even so, as whoever computes with them makes them wide
    """

    def __init__(self, model: nn.Module, wide: bool, narrow: Collection[str] = ()):
        self.model = model
        self.kinds = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in _named(model)}
        self.masters: dict[str, Tensor] = {}
        for name, tensor in _named(model):
            if wide and name not in narrow and tensor.dtype in HALF:
                tensor.data = tensor.data.float()
        model.requires_grad_(False)

    def dtype(self, name: str) -> torch.dtype:
        """Of a parameter as it is stored."""
        return self.kinds[name][0]

    @torch.no_grad()
    def rounded(self, on: bool, leaves: Mapping[str, nn.Parameter]) -> None:
        """Give the leaves the values that they will have on disk, or (off) their own again."""
        for name, leaf in leaves.items():
            if on and leaf.dtype != self.dtype(name) and name not in self.masters:
                self.masters[name] = leaf.detach().clone()
                leaf.copy_(leaf.to(self.dtype(name)))
            elif not on and name in self.masters:
                leaf.copy_(self.masters.pop(name))

    def restore(self, trained: Iterable[str]) -> None:
        """Everything back to its own dtype, on the CPU; no -0.0 in what was trained."""
        self.masters.clear()
        self.model.to("cpu")
        trained = set(trained)
        for name, tensor in _named(self.model):
            dtype, asked = self.kinds[name]
            tensor.data = tensor.data.to(dtype)
            if name in trained:
                tensor.data += 0.0
            tensor.grad = None
            tensor.requires_grad_(asked)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def precision(device: torch.device) -> str:
    """What Lightning is told: bfloat16 autocast on an accelerator that has it, float32 elsewhere."""
    if device.type == "cpu" or not torch.amp.is_autocast_available(device.type):
        return "32-true"
    known = getattr(getattr(torch, device.type), "is_bf16_supported", lambda: True)
    return "bf16-mixed" if known() else "32-true"


def flat_parameters(blocks: Iterable[Block], biases: bool = True, norms: bool = True) -> dict[str, nn.Parameter]:
    """The blocks' parameters with one dimension, by their names in the model: biases of linears, and all others."""
    found = {}
    for block in blocks:
        of_linears = {id(linear.module.bias) for linear in block.linears.values()}
        for inner, parameter in block.module.named_parameters():
            if parameter.ndim == 1 and (biases if id(parameter) in of_linears else norms):
                found[f"{block.name}.{inner}"] = parameter
    return found


def mark_trained(blocks: Iterable[Block], names: Iterable[str]) -> None:
    """Note in each block which of its parameters were trained, so that they are kept with it."""
    for block in blocks:
        inside = (name for name in names if name.startswith(f"{block.name}."))
        block.trained |= {name.removeprefix(f"{block.name}.") for name in inside}


def recompute(blocks: Iterable[Block], on: bool) -> None:
    """Keep what enters the blocks alone for the backward pass, and run each block again in it; or (off) no more."""
    for block in blocks:
        if on:
            block.module.forward = partial(recomputed, block.module.forward, use_reentrant=False)  # type: ignore[method-assign]
        elif "forward" in vars(block.module):
            del block.module.forward


def recovery_parts(
    context: Context,
    name: str,
    leaves: dict[str, nn.Parameter],
    reading: Text,
    *,
    finish: Callable[[], Any],
    switch: Callable[[bool], Any],
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    checks: int,
    patience: int | None,
    checkpointing: bool,
    distill: float,
    temperature: float,
    hidden: float,
    cache: int,
    labels: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
) -> Fit:
    """What Trainer.fit takes; the record of the training goes to `context.notes[name]`.

    masks: leaf's name -> kept, of leaves whose gradients are masked by hooks, which shares of them do not have
    """

    def dense() -> nn.Module:
        model = context.dense()
        return model.float() if kind == "32-true" else model

    def end() -> None:
        if sharding is not None:
            sharding.join()
        recompute(context.blocks, False)
        objective.forget()
        finish()

    kind = precision(context.device)
    rows = reading.batches.rows
    teacher: Running | Cached | None = None
    if cache and distill:
        file = context.checkpoints / "dense.safetensors"
        batch = reading.batches.batch
        teacher = Cached(dense, rows, file, top=cache, batch=batch, temperature=temperature, console=context.console)
    elif distill or hidden:
        teacher = Running(dense)
    objective: Objective | FeatureObjective
    if sees_images(context.model):
        objective = FeatureObjective(dense, labels)
    else:
        objective = Objective(teacher, distill=distill, hidden=hidden, temperature=temperature)
    sharding = Sharding(context.model, context.blocks, leaves, context.team, masks) if context.sharded else None
    module = Recovery(
        context.model,
        leaves,
        objective,
        steps=reading.steps,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        switch=switch,
        seed=context.seed,
        team=context.team,
        sharding=sharding,
    )
    module.trainer_options = {
        "max_epochs": 1,
        "accumulate_grad_batches": reading.accumulate,
        "gradient_clip_val": CLIP,
        "precision": kind,
        "num_sanity_val_steps": 0,
    }
    if checkpointing:
        recompute(context.blocks, True)
    note = context.notes[name] = {
        "trained_parameters": sum(leaf.numel() for leaf in leaves.values()),
        "tokens": reading.steps * reading.tokens,
        "passes": reading.steps * reading.tokens / (len(rows) * reading.length),
        "validation_tokens": len(reading.validation) * reading.length,
    }
    best = Best(
        reading.validation,
        batch=reading.batches.batch,
        checks=checks,
        patience=patience,
        finish=end,
        note=note,
    )
    callbacks: list[Any] = [teacher] if isinstance(teacher, Cached) else []
    callbacks += [
        best,
        Checkpoints(context.checkpoints, team=context.team if sharding else None),
        RecoveryProgress(context.console, best, reading.tokens),
    ]
    return Fit(module, reading.batches, callbacks)
