"""What a stage is given: the model as the stages before it left it, and what the recipe says of how to go over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekit import checkpoint
from sparsekit.blocks import Block, Linear
from sparsekit.commits import Commits
from sparsekit.pattern import Pattern
from sparsekit.plan import Plan, configured, timed
from sparsekit.recipe import Recipe, solvers
from sparsekit.report import Meter
from sparsekit.sections import Stage
from sparsekit.solvers.chain import chain
from sparsekit.stream import BlockStream
from sparsekit.team import Team


@dataclass
class Work:
    """The model in memory and everything a stage may need of the run.

    model, blocks: on the CPU; what is in them is what the stages before left
    tokens: the calibration tokens (sequences, length)
    output: the run's folder
    commits: of this stage
    first: no stage came before, so dense weights are the source checkpoint's; else they are what is in the model
    """

    planned: Plan
    model: nn.Module
    blocks: list[Block]
    tokens: Tensor
    output: Path
    commits: Commits
    meter: Meter
    first: bool = True
    team: Team = field(default_factory=Team)

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
            "dense_weight": self._source() if self.first else None,
            "commits": self.commits,
            "team": self.team,
        }
        return kind.over(self.model, self.blocks, self.tokens, **(settings | options))

    def solver(self, given: str | dict[str, Any] | Stage | Sequence[Any]) -> Callable[..., Tensor]:
        """A solver by name, {name: options}, or a chain as a list of these; each one's time counts to its name.

        Raises ValueError for unknown names, or a chain whose links do not fit.
        """
        return chain(*(timed(stage.name, configured("solvers", stage), self.meter) for stage in solvers(given)))

    def _source(self) -> Callable[[Linear], Tensor]:
        source = checkpoint.Checkpoint(self.planned.folder)
        prefix = str(self.model.base_model_prefix)
        return lambda linear: linear.stored(source.tensor(source.key(f"{linear.name}.weight", prefix)))
