"""What can be removed: heads, MLP channels, channels or heads of Mambas, whole attentions, MLPs or layers, experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsekit.model.structure.experts import ExpertCount
from sparsekit.model.structure.layers import Stretch

KINDS = ("heads", "channels", "mamba", "attention", "mlp", "layers", "experts")
FINE = {"heads", "channels", "mamba"}  # parts of parts: an output linear has columns for each
TOGETHER = (FINE, {"attention", "mlp"}, {"layers"}, {"experts"})  # kinds that may be removed together


@dataclass(frozen=True, eq=False)
class Part:
    """Units of one kind in one block. Where the kind is a whole part or layer, there is one unit.

    inputs: linear's name -> the rows (units, rows of each) that make the units: of q, k and v, or of gate and up
    output: the linear whose columns read them, o or down; None for a whole layer
    columns: of `output` (units, columns of each)
    parameters: that go with one unit, rows' biases included
    readers: other linears that read the units -> their columns (units, columns of each): a Mamba's x_proj
    beside: parameters of no linear -> the rows (units, rows of each) that belong to each unit: an attention's sinks;
        of buffers places in the last dimension
    norms: modules that normalise what all units give together -> the entries (units, entries of each) of their input
    staying: of `inputs` and `beside`, rows that belong to no unit and stay: one key and value for all queries, in a
        fused linear
    one_key: whether heads are queries that all share one key, which stays
    fewest: units that must stay, whatever the scores
    home: of experts, the name of their module, and what else has a place for each of them; of others empty
    outside: of a layer, the parameters outside all layers of which a stretch is its own
    """

    block: int
    kind: str
    count: int
    parameters: int
    inputs: dict[str, Tensor]
    output: str | None
    columns: Tensor
    readers: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    staying: dict[str, Tensor] = field(default_factory=dict)
    one_key: bool = False
    fewest: int = 0
    home: str = ""
    experts: ExpertCount | None = None
    outside: dict[str, Stretch] = field(default_factory=dict)

    def rows_left(self, name: str, kept: Tensor) -> Tensor:
        """What is left of `inputs` or `beside`, in ascending order: q, k and v of a fused linear stay so."""
        rows = (self.inputs | self.beside)[name][kept].flatten()
        return torch.cat([rows, self.staying.get(name, rows[:0])]).sort().values

    @property
    def least(self) -> int:
        """How many must stay, whatever the scores: of experts as many as each token is sent to."""
        return self.fewest if self.experts is None else self.experts.least


@dataclass(frozen=True)
class Units:
    """All units of a model, numbered part by part. A mask over them is a tensor (units,), true where a unit is kept."""

    parts: tuple[Part, ...]
    total: int  # parameters of all blocks

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @cached_property
    def parameters(self) -> Tensor:
        """Of each unit (units,), int64."""
        return self._spread([part.parameters for part in self.parts])

    @cached_property
    def block(self) -> Tensor:
        """The index of each unit's block (units,)."""
        return self._spread([part.block for part in self.parts])

    @cached_property
    def part(self) -> Tensor:
        """The number of each unit's part (units,)."""
        return self._spread(list(range(len(self.parts))))

    @cached_property
    def kind(self) -> Tensor:
        """The number, in `kinds`, of each unit's kind (units,)."""
        return self._spread([self.kinds.index(part.kind) for part in self.parts])

    def of(self, kind: str) -> Tensor:
        """Whether each unit is of a kind (units,)."""
        return self._spread([part.kind == kind for part in self.parts])

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds that occur."""
        return sorted({part.kind for part in self.parts}, key=KINDS.index)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of all units (units, ...) part by part."""
        return list(values.split([part.count for part in self.parts]))

    def removed(self, kept: Tensor) -> float:
        """The share of the blocks' parameters that a mask removes."""
        return int(self.parameters[~kept].sum()) / self.total

    def _spread(self, values: list[Any]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor([part.count for part in self.parts]))


NAMED = {"heads-and-channels": ["heads", "channels"], "parts": ["attention", "mlp"]}


def kinds_of(units: str | Sequence[str]) -> list[str]:
    """The kinds of units that an option names: "heads-and-channels", "parts", a kind, or a list of kinds.

    Raises ValueError for kinds that are unknown or cannot be removed together.
    """
    kinds = NAMED.get(units, [units]) if isinstance(units, str) else list(units)
    check_kinds(kinds)
    return kinds


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ValueError unless these kinds of units exist and can be removed together."""
    if not kinds or not any(set(kinds) <= each for each in TOGETHER):
        raise ValueError(
            f"units are {', '.join(kinds) or 'none'}; they can be heads, channels and mamba, attention and mlp, "
            "layers, or experts"
        )
