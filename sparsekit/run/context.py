"""What a stage or a criterion is given; see `sparsekit.contracts.Context`."""

import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekit import registry
from sparsekit.contracts import Decision, share
from sparsekit.maths import Norms, Pattern, Stats, chain
from sparsekit.measure import perplexity
from sparsekit.model import Block, Weights, same_tower
from sparsekit.model.structure import FINE, Units, find_units, kinds_of
from sparsekit.recipe import named_solvers
from sparsekit.run.methods import configured, timed
from sparsekit.run.shared import STATISTICS, Common
from sparsekit.system import Meter, Team, human_size, unpack
from sparsekit.walk import BlockStream, Commits, Cutting, Gathered


@dataclass
class Context:
    """The model in memory and what the recipe says of how to go over it. Fields as in `sparsekit.contracts.Context`.

    commits: of this stage
    index: of this stage, or of the solvers that share a walk, among those that run one by one
    before: where the masks are of the stage that pruned weights before this one (its `masks(block)` gives them packed);
        None: none did
    load_dense, load_tokenizer: the model that was never pruned, and the tokenizer, when they are asked for
    calibration: the settings that the tokens were made from, for stages that read more of the same text
    base: what the model is called
    common: of a run with one of several patterns, where all of them keep what is the same; None: there is one pattern
    bos: the token that stands before every window of text; None: windows are cut as published
    """

    model: nn.Module
    blocks: list[Block]
    tokens: Tensor
    output: Path
    patterns: dict[str, Pattern] = field(default_factory=dict)
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    seed: int = 0
    error_correction: str = "prefix"
    batch: int = 1
    activations: int = 4 * 10**9
    statistics: int = 4 * 10**9
    commits: Commits = field(default=None)  # type: ignore[assignment]
    index: int = 0
    before: Any = None
    load_dense: Callable[[], nn.Module] | None = None
    load_tokenizer: Callable[[], Any] | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    bos: int | None = None
    meter: Meter = field(default_factory=Meter)
    team: Team = field(default_factory=Team)
    sharded: bool = False
    common: Common | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        if self.commits is None:
            self.commits = Commits(self.output / "blocks", Weights(self.output / "weights", self.model))

    @property
    def first(self) -> bool:
        """Whether no stage has pruned weights, so that there is no answer to start from."""
        return self.before is None

    @property
    def scratch(self) -> Path:
        """Where this process keeps what is needed while the stage runs."""
        return self.output / "activations" / str(self.team.rank)

    @property
    def checkpoints(self) -> Path:
        """Where this stage keeps Lightning's checkpoints while it trains."""
        return self.commits.folder / "checkpoints"

    def stream(self, kind: type[BlockStream] | None = None, **options: Any) -> Any:
        """The stream of the recipe: its error correction, batches and activation budget.

        kind: a subclass of `BlockStream`; options: see there
        """
        settings: dict[str, Any] = {
            "batch": self.batch,
            "budget": self.activations,
            "grams": self.statistics,
            "folder": self.scratch,
            "error_correction": self.error_correction,
            "commits": self.commits,
            "team": self.team,
        }
        return (kind or BlockStream).over(self.model, self.blocks, self.tokens, **(settings | options))

    def gathered(self, stats: type[Norms]) -> Gathered | None:
        """Where statistics are kept for runs with other patterns; None where these would gather others, or no room is.

        That of the dense model's inputs alone: of the first stages, without error correction.
        """
        if self.common is None or self.index or self.error_correction != "none" or self.team.size > 1:
            return None
        if any(block.experts for block in self.blocks):  # which come in turns
            warnings.warn("experts are captured in turns, so each pattern has a capture of its own", stacklevel=2)
            return None
        widths = [block.linears[group[0]].shape[1] for block in self.blocks for group in block.groups]
        size = sum(4 * width * (width if stats is Stats else 1) for width in widths)
        room = shutil.disk_usage(self.common.folder.parent).free
        if size > room / 2:
            warnings.warn(
                f"one capture for all patterns would keep {human_size(size)} in {self.common.folder}, and there is "
                f"room for {human_size(room)}: each pattern has a capture of its own",
                stacklevel=2,
            )
            return None
        return Gathered(self.common.folder / STATISTICS, self.common.of, self.blocks, stats)

    def through(self) -> Any:
        """A stream through the model as it is, on `device`: nothing is read, restored or pruned on the way."""
        stream = self.stream(error_correction="prefix", commits=None)
        stream.move(self.device)
        return stream

    def solver(self, given: Any) -> Callable[..., Tensor]:
        """A solver by name, {name: options}, or a chain as a list of these; each one's time counts to its name.

        Raises ValueError for unknown names, or a chain whose links do not fit.
        """
        return chain(*(timed(stage.name, configured("solvers", stage), self.meter) for stage in named_solvers(given)))

    def masks(self) -> dict[str, Tensor]:
        """A linear's name -> the weights (out, in) that the stages before kept; empty where they pruned none."""
        return {name: kept for block in self.blocks for name, kept in self.earlier(block).items()}

    def earlier(self, block: Block) -> dict[str, Tensor]:
        """The same of one block."""
        if self.before is None:
            return {}
        return {name: unpack(bits, block.linears[name].shape) for name, bits in self.before.masks(block).items()}

    def tokenizer(self) -> Any:
        """The source checkpoint's tokenizer, or image processor.

        Raises ValueError where the model came without one.
        """
        if self.load_tokenizer is None:
            raise ValueError("this stage reads text and the model came without a tokenizer; give one")
        return self.load_tokenizer()

    def dense(self) -> nn.Module:
        """The model that was never pruned, loaded anew.

        Raises ValueError where it is nowhere to be had.
        """
        if self.load_dense is None:
            raise ValueError(
                "the dense model is asked for and was not kept; give the model by its folder, or copy=True to prune"
            )
        dense = self.load_dense()
        same_tower(dense, self.model)
        return dense

    def loss(self, tokens: Tensor | None = None) -> float:
        """The mean loss (nats a token) of the model, as it runs now, on `tokens` or the calibration tokens.

        Several processes share the sequences. A loss that is not a number counts as 1e4.
        """
        tokens = (self.tokens if tokens is None else tokens)[self.team.rank :: self.team.size]
        mine = math.log(perplexity(self.model, tokens, batch=self.batch, device=self.device))
        sums = torch.tensor([mine * len(tokens), float(len(tokens))], device=self.device)
        self.team.sum([sums])
        return float((sums[0] / sums[1]).nan_to_num(nan=1e4).clamp(max=1e4))

    def scores(self, criterion: str, units: Units, remove: float) -> Tensor:
        """The scores (units,) of a criterion, float32 in CPU memory; higher is better.

        Raises ValueError for a criterion that is not there, or does not score these kinds of units.
        """
        return self.decide(criterion, units, remove).scores

    def decide(self, criterion: str, units: Units, remove: float, **options: Any) -> Decision:
        """The same with all that the criterion says. options: its own."""
        self.check_kinds(criterion, units.kinds)
        function: Any = registry.load("criteria", criterion)
        found = function(self, units, remove=remove, **options)
        decision = found if isinstance(found, Decision) else Decision(found)
        scores = decision.scores
        if not isinstance(scores, Tensor) or scores.shape != (len(units),) or not scores.isfinite().all():
            raise ValueError(f"{criterion} must give a finite score for each of {len(units)} units")
        decision.scores = scores.detach().cpu()
        return decision

    @staticmethod
    def check_kinds(criterion: str, kinds: Sequence[str]) -> None:
        """Raise ValueError unless a criterion scores these kinds of units."""
        known = registry.load("criteria", criterion).scoring.kinds  # type: ignore[attr-defined]
        if others := set(kinds) - set(known):
            raise ValueError(
                f"{criterion} scores {', '.join(known)}, not {', '.join(sorted(others))}; choose another criterion"
            )

    def with_tokens(self, tokens: Tensor) -> "Context":
        """The same on other tokens (sequences, length)."""
        return replace(self, tokens=tokens)

    def cutting(
        self,
        remove: str | float,
        units: str | Sequence[str],
        *,
        compensate: bool = False,
        bias: bool = False,
        damping: float = 0.01,
        **options: Any,
    ) -> Cutting:
        """What ends a structural stage: units of these kinds are chosen, made up for, and committed; see `Cutting`.

        remove: a share such as "30%". options: shape, budgets and least of `choose`. Raises ValueError for what is out
        of range or would have no effect, and for units that this model does not have.
        """
        kinds = kinds_of(units)
        if compensate and not set(kinds) <= FINE:
            raise ValueError(
                f"compensate: true makes up for heads, channels and mamba, not for {', '.join(kinds)}; leave it out"
            )
        if compensate and bias and self.error_correction in ("block", "model"):
            raise ValueError(
                f"error_correction is {self.error_correction}, with which no bias can be solved for; give "
                "bias: false, or prefix or none"
            )
        return Cutting(
            find_units(self.model, self.blocks, kinds),
            self.commits,
            remove=share(remove),
            stream=self.stream if compensate else None,
            device=self.device,
            bias=bias,
            damping=damping,
            leads=self.team.rank == 0,
            **options,
        )
