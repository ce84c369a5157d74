"""LAMP: each block learns to make up for the pruning of those before it, then it is pruned itself."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from lightning.pytorch import Callback, Trainer
from pydantic import AfterValidator
from torch import Tensor

from sparsekit.contracts import Context, Effect, Fit, NotNegative, declares
from sparsekit.maths import Pattern, Quantization
from sparsekit.model import Block
from sparsekit.recipe import SolverChain, grid_of
from sparsekit.system import ActivationStore, give_back
from sparsekit.train import channel_weights, reconstruct
from sparsekit.walk import BlockStream, OneShot, Walk, Witness

RETRIES = 2
TOKENS = 256  # of a step, about
TOGETHER = 4096  # tokens of a step that are computed at once, at most


def _a_grid(settings: dict[str, Any]) -> dict[str, Any]:
    Quantization.of(settings)
    return settings


Grid = Annotated[dict[str, Any], AfterValidator(_a_grid)]


def _effect(options: Mapping[str, Any]) -> Effect:
    """It ends on the grid of `quantize`, or of its solver where nothing is trained after that."""
    settings = options["quantize"]
    grid = (
        Quantization.of(settings) if settings is not None else None if options["after"] else grid_of(options["solver"])
    )
    return Effect(
        prunes=True,
        moves=True,
        start="dense",
        grid=grid,
        reads=("text",) if options["channels"] == "loss" else ("text", "images"),  # the loss is of text
        gradients=True,
        corrections=("prefix",),
        processes="many",
        walks=True,
    )


@declares(_effect)
def lamp(
    context: Context,
    *,
    solver: SolverChain = "sparsegpt",
    after: bool = True,
    quantize: Grid | None = None,
    epochs: Annotated[int, Ge(0)] = 12,
    learning_rate: Annotated[float, Gt(0)] | None = None,
    trainable: Literal["all", "low-rank", "norms-and-biases"] = "all",
    rank: Annotated[int, Ge(1)] = 16,
    batch: Annotated[int, Ge(1)] | None = None,
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.05,
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1,
    patience: Annotated[int, Ge(1)] = 3,
    per_token: bool = True,
    channels: Literal["alike", "energy", "loss"] = "energy",
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: NotNegative = 0.0,
) -> Fit:
    """Train each block to make up for the pruning of those before it, then prune it (LAMP, Algorithm 1).

    Two streams go through the model: what the pruned blocks give, and what the dense ones give. A block that is still
    dense is trained to turn the one into the other; then the solver prunes the trained weights, with `prefix`
    statistics. What the paper leaves open, learning rate, steps and optimizer, is as in `reconstruct`.

    solver: a solver's name, {name: options}, or a list of these, a chain
    after: train every block once more after it was pruned, zeros kept, towards the same outputs. The paper does not; it
        is the larger half of the gain, and what the last block has no next one for.
    quantize: {bits, group, symmetric ...}, the options of the solver `quantize`, which has the last word in a block's
        turn: later blocks make up for rounding as they do for pruning.
    learning_rate: its peak; null: by the block's sparsity, see `rate_for`. A quarter of it is tried where it betters
        nothing.
    batch: sequences in a step of each process; null: as many as have 256 tokens in all, half of all at most. The
        recipe's calibration.batch, how many are computed together elsewhere, does not count here.
    optimizer: adamw, or sgd with a momentum of 0.9, which needs a learning_rate: the rule is for adamw
    channels: what each channel's error counts: alike; by its own energy, see `reconstruct`; or by the loss, the mean
        square of its gradient in the model as it comes, of language models
    epochs, trainable, rank, held_out, warmup, patience, per_token, weight_decay: see `reconstruct`; held_out is a share
        of the sequences

    Besides the linears it changes norms and biases, and what else has one dimension; never what the recipe leaves as it
    is, nor convolutions, routers and gates. A linear's reported error is that of its final weight, on what enters it
    then, against the dense model's output for the same tokens (of one sequence that was held out). Memory beside a
    layer-wise walk: a second set of activations, and for one block a float32 copy, gradients and AdamW's two moments.
    Raises ValueError for a solver that is not there, and unless the recipe's error_correction is prefix, or if a
    solver's answer on a grid would be trained again.
    """
    if context.error_correction != "prefix":
        raise ValueError(
            f"error_correction is {context.error_correction!r}; lamp corrects errors between blocks itself and "
            "needs prefix"
        )
    if all(pattern.sparsity == 0 for pattern in context.patterns.values()):
        raise ValueError("the pattern removes nothing, so that there is nothing to make up for: leave lamp out")
    count = len(context.tokens) // context.team.size  # sequences of a process
    if count < 2:
        raise ValueError(
            "lamp trains on some sequences and holds others out: give calibration at least 2 samples for each process"
        )
    grid = None
    if quantize is not None:
        grid = OneShot(context.solver({"quantize": quantize}), context.patterns, context.seed, continues=True)
    length = math.prod(context.tokens.shape[1:]) if context.tokens.ndim == 2 else TOKENS  # a picture is a step
    batch = batch or max(1, min(TOKENS // length // context.team.size, count // 2))
    together = batch if batch * length <= TOGETHER else 1
    if together >= count:
        raise ValueError(
            f"batch is {batch}, and there are {count} sequences, of which some are held out: give a smaller batch, or "
            "more samples"
        )
    weights: list[Tensor] | None = None
    if channels == "loss":
        tokens = context.tokens[context.team.rank :: context.team.size]
        file = context.checkpoints / "channels.safetensors"
        with context.meter.stage("gradients"):
            weights = channel_weights(file, context.model, context.blocks, tokens, context.device, context.team)
    stream = context.stream(LampStream, error_correction="model", batch=together)
    train = Lamp(
        OneShot(context.solver(solver), context.patterns, context.seed),
        after=after,
        quantize=grid,
        learning_rate=learning_rate,
        channels=weights or ("energy" if channels == "energy" else "alike"),
        seed=context.seed,
        timer=partial(context.meter.stage, "reconstruct"),
        team=context.team,
        epochs=epochs,
        trainable=trainable,
        rank=rank,
        batch=-(-batch // together),
        held_out=held_out,
        warmup=warmup,
        patience=patience,
        per_token=per_token,
        optimizer=optimizer,
        weight_decay=weight_decay,
    )
    return Fit(Walk(stream), stream, [train])


def _check(options: Mapping[str, Any]) -> None:
    if options["optimizer"] == "sgd" and options["learning_rate"] is None:
        raise ValueError("optimizer is sgd, and the rule for the learning rate is for adamw: give a learning_rate")
    if options["after"] and grid_of(options["solver"]) is not None:
        raise ValueError(
            "lamp trains a block again after its solver has quantized it, which moves weights off the grid; "
            "give `quantize` to lamp and not to its solver, or after: false"
        )


lamp.check = _check  # type: ignore[attr-defined]  # what options mean together


class LampStream(BlockStream):
    """Carries what enters a block in the pruned model (`inputs`) and in the dense one (`dense_inputs`).

    It is made and replayed like a stream of error_correction "model", but solvers see it as they see "prefix": inputs
    from the pruned blocks before, targets from the block's own weights on the same inputs. Those are trained weights.
    """

    def __init__(self, *stores: Any, **options: Any):
        super().__init__(*stores, **options)
        self.coupled = False  # one pass gives the statistics of all groups

    def targets(self, block: Block) -> ActivationStore:
        """The dense model's outputs of a block that is still dense; from now on they are `dense_inputs`."""
        assert self.dense_inputs is not None
        for index, chunk in enumerate(self.dense_inputs):
            self.dense_inputs[index] = block(chunk)
        return self.dense_inputs


class Lamp(Callback):
    """Algorithm 1 of LAMP on a walk over a `LampStream`: in a block's turn it is trained, pruned and trained again.

    Training comes first in a block's own turn, not last in the turn of the block before: the same computation, but a
    committed block is a finished one.

    prune: what prunes the block between the two, as a `OneShot` does
    after: whether it is trained once more after it was pruned, zeros kept; the paper does not
    quantize: what puts it on a grid at the end, zeros kept
    learning_rate: its peak; None: `rate_for` the block. A training that bettered nothing is done again at a quarter of
        it, and then of that.
    channels: alike, energy, or the weights (hidden,) of each block's channels
    seed: with the block's index added, of the order of the chunks
    timer: opened around each training
    options: of `reconstruct`

    `block.notes["lamp"]` is the record of each training, "before" and "after" the pruning.
    """

    def __init__(
        self,
        prune: OneShot,
        *,
        after: bool = True,
        quantize: OneShot | None = None,
        learning_rate: float | None = None,
        channels: Literal["alike", "energy"] | list[Tensor] = "alike",
        seed: int = 0,
        timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ):
        self.prune, self.after, self.quantize, self.learning_rate = prune, after, quantize, learning_rate
        self.channels, self.seed, self.timer, self.options = channels, seed, timer, options

    def on_train_batch_start(self, trainer: Trainer, walk: Walk, block: Block, batch_idx: int) -> None:  # type: ignore[override]
        """Train, prune, train, measure.

        Raises:
            ValueError: as `OneShot` and `reconstruct` do.
        """
        stream = walk.stream
        assert isinstance(stream, LampStream) and stream.dense_inputs is not None
        place = len(stream.inputs) - 1  # a chunk that no training sees where any is held out
        witness = Witness(block, stream.dense_inputs[place])
        targets = stream.targets(block)
        train = partial(self._train, block, stream.inputs, targets)
        said = {"before": train()} if block.index else {}  # nothing before the first block was pruned
        self.prune.on_train_batch_start(trainer, walk, block, batch_idx)
        if self.after:
            said["after"] = train(masks=block.masks)
        if self.quantize:
            self.quantize.on_train_batch_start(trainer, walk, block, batch_idx)
        block.notes["lamp"] = said
        for name, error in witness.errors(block, stream.inputs[place], stream.team).items():
            block.records[name]["error"] = error

    def _train(
        self, block: Block, inputs: ActivationStore, targets: ActivationStore, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        rate = rate_for(block, self.prune.patterns) if self.learning_rate is None else self.learning_rate
        with self.timer():
            for attempt in range(1 + RETRIES):
                record = reconstruct(
                    block,
                    inputs,
                    targets,
                    masks=masks,
                    learning_rate=rate / 4**attempt,
                    channels=self.channels if isinstance(self.channels, str) else self.channels[block.index],
                    seed=self.seed + block.index,
                    **self.options,
                )
                if record["best_epoch"] or not record["epochs"]:
                    break
        give_back()
        return record


def rate_for(block: Block, patterns: Mapping[str, Pattern]) -> float:
    """The learning rate for a block: 0.0087 s^3 min(1, r / 0.06), by measurement (docs/methods/lamp.md).

    s: the share of the block's weights that its patterns remove: 1.1e-3 at 50 %, 3e-3 at 70 %. r: the root mean square
    of the weights that are there; those of wide models are small.
    """
    counts = {name: linear.weight.numel() for name, linear in block.linears.items()}
    sparsity = sum(patterns[name].sparsity * count for name, count in counts.items()) / sum(counts.values())
    energy = sum(float(linear.weight.float().square().sum()) for linear in block.linears.values())
    there = sum(int(linear.weight.count_nonzero()) for linear in block.linears.values())
    return 0.0087 * sparsity**3 * min(1.0, math.sqrt(energy / max(there, 1)) / 0.06)
