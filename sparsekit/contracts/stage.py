"""Stages: what one declares, what it is given, and what it gives the run.

A stage is a function `(context, *, options...) -> Fit`, found through the entry-point group `sparsekit.stages`. What it
finds it leaves in the blocks: masks, records, changed parameters; see `sparsekit.walk.findings`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback, LightningModule
    from rich.console import Console
    from torch import Tensor, nn

    from sparsekit.maths import Pattern, Quantization
    from sparsekit.model import Block
    from sparsekit.model.structure import Units
    from sparsekit.system import Meter, Team

F = TypeVar("F", bound=Callable[..., Any])


class StageError(ValueError):
    """A stage did something else than it declares; the message names the stage and its package."""


@dataclass(frozen=True)
class Effect:
    """What a stage does to the model. Whatever is not declared is not allowed, and the run checks it.

    prunes: weights of the blocks' linears become zero by the recipe's `pattern`; every linear gets a mask
    cuts: heads, channels or layers are taken out, so that tensors become smaller
    moves: weights that stay, or other parameters, get other values. A stage that prunes and does not move gives masks
        alone, and the run applies them
    resizes: the width between blocks changes (SliceGPT): blocks become other modules, and nothing of the source is
        left to compare with
    start: what the stage begins with: "dense", the dense model, so that the answer of an earlier pruning stage would be
        lost; "answer", only what an earlier pruning stage left; "any", whatever is there
    grid: the quantization grid that every weight of the pruned linears lies on afterwards, as the options of the solver
        `quantize`; None where there is none
    unmerged: the stage leaves its update beside the model, so nothing may come after it
    reads: what it can be given: "text", "images"
    processes: "many" if it shares its work with other processes, "one" if it runs alone
    divides: what it trains can be divided among processes, where `context.sharded` asks for it
    gradients: it needs gradients with respect to the model's own parameters
    corrections: the values of the recipe's `error_correction` that it works with; all where it says none
    walks: it touches weights only while `context.stream()` is at their block; so that all others can stay on disk. Else
        the whole model is read before it begins
    """

    prunes: bool = False
    cuts: bool = False
    moves: bool = False
    resizes: bool = False
    start: Literal["dense", "answer", "any"] = "any"
    grid: "Quantization | None" = None
    unmerged: bool = False
    reads: tuple[Literal["text", "images"], ...] = ("text",)
    processes: Literal["one", "many"] = "one"
    divides: bool = False
    gradients: bool = False
    corrections: tuple[str, ...] = ()
    walks: bool = False


def declares(effect: Effect | Callable[[Mapping[str, Any]], Effect]) -> Callable[[F], F]:
    """Declare a stage's effect: `@declares(Effect(prunes=True))`.

    effect: or a function of all of the stage's options by name, where the effect depends on them
    """

    def mark(stage: F) -> F:
        stage.effect = effect  # type: ignore[attr-defined]
        return stage

    return mark


class Fit(NamedTuple):
    """What a stage gives the run: what Lightning's `Trainer.fit` takes.

    A stage that is over before it trains anything gives none of it (None).
    """

    module: "LightningModule"
    data: Any
    callbacks: "Sequence[Callback]" = ()


class Stage(Protocol):
    """A stage of a recipe: `(context, *, options...) -> Fit`, with an effect declared by `declares`."""

    def __call__(self, context: "Context", /, **options: Any) -> "Fit | None":
        """Get ready: everything that can be wrong is said here, before anything is trained."""
        ...


class Context(Protocol):
    """What a stage or a criterion is given: the model as the stages before left it, and the recipe's settings.

    model, blocks: in CPU memory; for a stage that walks, a block has its weights in its turn only
    tokens: calibration tokens (sequences, length), or pixels (images, channels, height, width)
    patterns: a linear's name -> the pattern it is to get; none where the recipe has no `pattern`
    device: where the recipe computes
    seed: of everything random
    error_correction, batch: of the recipe; batch: sequences that go through a block at once
    activations: bytes of activations that may be in memory; the rest goes to `scratch`, a folder of this process
    statistics: bytes of a block's Gram matrices that may be in memory
    output: the folder of the run; checkpoints: where Lightning's checkpoints of this stage go
    team: the processes that work together; sharded: whether each is to have a share of what is trained (`fsdp`)
    notes: a stage's name -> what it saw, for the report; JSON
    calibration: the settings that the tokens were made from; base: what the source is called
    bos: the token that stands before every window of text; None: windows are cut as published
    """

    model: "nn.Module"
    blocks: "list[Block]"
    tokens: "Tensor"
    output: Path
    meter: "Meter"
    team: "Team"
    sharded: bool
    console: "Console"
    notes: dict[str, Any]
    calibration: Mapping[str, Any]
    base: str
    bos: int | None

    @property
    def patterns(self) -> "dict[str, Pattern]":
        """A linear's name -> its pattern."""
        ...

    @property
    def device(self) -> "torch.device":
        """Where the recipe computes."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    @property
    def error_correction(self) -> str:
        """Of the recipe: prefix, none, block or model."""
        ...

    @property
    def batch(self) -> int:
        """Sequences that go through a block at once."""
        ...

    @property
    def activations(self) -> int:
        """Bytes of activations in memory."""
        ...

    @property
    def statistics(self) -> int:
        """Bytes of a block's Gram matrices in memory."""
        ...

    @property
    def scratch(self) -> Path:
        """A folder of this process for what is needed while the stage runs."""
        ...

    @property
    def checkpoints(self) -> Path:
        """Where Lightning's checkpoints of this stage go."""
        ...

    def stream(self, kind: Any = None, **options: Any) -> Any:
        """The stream over the blocks with the recipe's error correction; see `sparsekit.walk.BlockStream`."""
        ...

    def with_tokens(self, tokens: "Tensor") -> "Context":
        """The same on other tokens."""
        ...

    def dense(self) -> "nn.Module":
        """The model that was never pruned, loaded anew. ValueError where it is nowhere to be had."""
        ...

    def cutting(self, remove: Any, units: Any, **options: Any) -> Any:
        """What ends a structural stage: units are chosen, made up for and committed; see `sparsekit.walk.Cutting`."""
        ...

    def through(self) -> Any:
        """A stream through the model as it is: nothing is read, restored or pruned on the way."""
        ...

    def solver(self, given: Any) -> "Callable[..., Tensor]":
        """A solver by name, {name: options}, or a chain as a list of these."""
        ...

    def masks(self) -> "dict[str, Tensor]":
        """A linear's name -> the weights (out, in) that earlier stages kept; empty where they pruned none."""
        ...

    def tokenizer(self) -> Any:
        """The source checkpoint's tokenizer, or image processor."""
        ...

    def loss(self, tokens: "Tensor | None" = None) -> float:
        """The mean loss (nats a token) of the model, as it runs now, on tokens, or else the calibration tokens."""
        ...

    def scores(self, criterion: str, units: "Units", remove: float) -> "Tensor":
        """The scores (units,) of a criterion by its name, as `policy_gradient` starts from them."""
        ...
