"""What a stage is given: the model as the stages before it left it, and what the recipe says of how to go over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekit.maths import Pattern, chain
from sparsekit.model import Block, Checkpoint, Linear, load_tokenizer
from sparsekit.model.structure import Units, choose, find_units, share
from sparsekit.recipe import Recipe, Stage, named_solvers
from sparsekit.results import Before
from sparsekit.run.plan import Plan, configured, timed
from sparsekit.system import Meter, Team, unpack
from sparsekit.walk import BlockStream, Commits, Remove


@dataclass
class Work:
    """The model in memory and everything a stage may need of the run.

    model, blocks: on the CPU; what is in them is what the stages before left
    tokens: the calibration tokens (sequences, length)
    output: the run's folder
    commits: of this stage
    index: of this stage, or of the solvers that share a walk, in the recipe
    first: no stage has pruned weights, so there is nothing to start from
    before: where the masks are of the stage that pruned weights before this one
    notes: a stage's name -> what it saw; JSON, for the report
    """

    planned: Plan
    model: nn.Module
    blocks: list[Block]
    tokens: Tensor
    output: Path
    commits: Commits
    meter: Meter
    index: int = 0
    first: bool = True
    before: Commits | Before | None = None
    team: Team = field(default_factory=Team)
    notes: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.planned.recipe

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.recipe.seed

    @property
    def patterns(self) -> dict[str, Pattern]:
        """A linear's name -> its pattern."""
        return self.planned.patterns

    @property
    def activations(self) -> Path:
        """Where this process keeps the activations that exceed the budget."""
        return self.output / "activations" / str(self.team.rank)

    def stream(self, kind: type[BlockStream] = BlockStream, **options: Any) -> Any:
        """The stream of the recipe: its error correction, batches and activation budget. options: see `BlockStream`."""
        settings: dict[str, Any] = {
            "batch": self.planned.batch,
            "budget": self.recipe.memory.activations,
            "folder": self.activations,
            "error_correction": self.recipe.error_correction,
            "dense_weight": self._source() if self.index == 0 else None,
            "commits": self.commits,
            "team": self.team,
        }
        return kind.over(self.model, self.blocks, self.tokens, **(settings | options))

    def through(self, device: torch.device) -> Any:
        """A stream through the model as it is, on `device`: nothing is read, restored or pruned on the way."""
        stream = self.stream(error_correction="prefix", commits=None, dense_weight=None)
        stream.device = device
        return stream

    def solver(self, given: str | dict[str, Any] | Stage | Sequence[Any]) -> Callable[..., Tensor]:
        """A solver by name, {name: options}, or a chain as a list of these; each one's time counts to its name.

        Raises ValueError for unknown names, or a chain whose links do not fit.
        """
        return chain(*(timed(stage.name, configured("solvers", stage), self.meter) for stage in named_solvers(given)))

    def masks(self) -> dict[str, Tensor]:
        """A linear's name -> the weights (out, in) that the stages before kept; empty where they pruned none."""
        if self.before is None:
            return {}
        return {
            name: unpack(bits, block.linears[name].shape)
            for block in self.blocks
            for name, bits in self.before.masks(block).items()
        }

    def tokenizer(self) -> Any:
        """The source checkpoint's."""
        return load_tokenizer(self.planned.folder, trust_remote_code=self.recipe.model.trust_remote_code)

    @property
    def checkpoints(self) -> Path:
        """Where this stage keeps Lightning's checkpoints while it trains."""
        return self.commits.folder / "checkpoints"

    def removal(
        self,
        remove: str | float,
        kinds: Sequence[str],
        *,
        compensate: bool = False,
        bias: bool = False,
        damping: float = 0.01,
        **options: Any,
    ) -> tuple[Units, Remove]:
        """The units of these kinds, and the callback that ends a structural stage (see `Remove`).

        remove: a share such as "30%". options: shape, budgets and least of `choose`. Raises ValueError for what is out
        of range or would have no effect, and for units that this model does not have.
        """
        if compensate and not set(kinds) <= {"heads", "channels"}:
            raise ValueError(
                f"compensate: true makes up for heads and channels, not for {', '.join(kinds)}; leave it out"
            )
        if bias and not compensate:
            raise ValueError("bias: true is part of least squares; give compensate: true with it, or leave it out")
        if bias and self.recipe.error_correction in ("block", "model"):
            raise ValueError(
                f"error_correction is {self.recipe.error_correction}, with which no bias can be solved for; give "
                "bias: false, or prefix or none"
            )
        if not damping > 0:
            raise ValueError(f"damping is {damping}; it must be above 0")
        units = find_units(self.model, self.blocks, kinds)
        choose(units, torch.zeros(len(units)), share(remove), **options)  # so that it is said now, not at the end
        streams = partial(self.stream, dense_weight=None) if compensate else None
        ending = Remove(
            units,
            self.commits,
            remove=share(remove),
            stream=streams,
            bias=bias,
            damping=damping,
            leads=self.team.rank == 0,
            **options,
        )
        return units, ending

    def _source(self) -> Callable[[Linear], Tensor] | None:
        source = Checkpoint(self.planned.folder)
        prefix = str(self.model.base_model_prefix)
        if not source.names(prefix) >= {f"{name}.weight" for block in self.blocks for name in block.linears}:
            return None  # stored under other names; in memory are the source's weights, as nothing was pruned yet
        return lambda linear: linear.stored(source.tensor(source.key(f"{linear.name}.weight", prefix)))
