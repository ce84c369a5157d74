"""The zeros of a source that is sparse already: recovery holds them as it holds those of a stage before it."""

from typing import Any

import torch
from torch import Tensor

from sparsekit.maths import NM
from sparsekit.model import Block, filled
from sparsekit.system import pack

SHARE = 0.05  # of exact zeros in a linear, from which on they were meant
GROUPS = (NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8))


class SourceZeros:
    """The masks and records of a model that was pruned by nobody knows whom; what `Before` is for a run of ours.

    A linear counts as pruned where more than 5 % of its weights are exact zeros. What is kept is noted at once: it is
    what training is held to, so training must not be able to change it.
    """

    def __init__(self, blocks: list[Block]):
        self.patterns: dict[str, str] = {}
        self.kept: dict[str, Tensor] = {}  # packed
        self.zeros: dict[str, int] = {}
        total = 0
        for block in blocks:
            with filled([block]):
                for name, linear in block.linears.items():
                    self._look(name, linear.weight.detach())
            total += sum(linear.weight.numel() for linear in block.linears.values())
        self.share = sum(self.zeros.values()) / max(1, total)

    def _look(self, name: str, weight: Tensor) -> None:
        found = _pattern(weight)
        if found is not None:
            self.patterns[name] = found
        self.kept[name] = pack(weight != 0 if found is not None else torch.ones(weight.shape, dtype=torch.bool))
        self.zeros[name] = int((weight == 0).count_nonzero())

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A block's masks as packed bits, by the names of its linears."""
        return {name: self.kept[name] for name in block.linears}

    def records(self, block: Block) -> dict[str, dict[str, Any]]:
        """As `Block.records` has them."""
        found = {}
        for name, linear in block.linears.items():
            if name in self.patterns:
                zeros, parameters = self.zeros[name], linear.weight.numel()
                found[name] = {"sparsity": zeros / parameters, "pattern": self.patterns[name], "zeros": zeros}
                found[name] |= {"parameters": parameters, "error": None, "seconds": 0.0, "warnings": []}
        return found


def _pattern(weight: Tensor) -> str | None:
    """What a weight (out, in) was pruned to; None: it was not."""
    share = int((weight == 0).count_nonzero()) / weight.numel()
    if share <= SHARE:
        return None
    for group in GROUPS:
        if weight.shape[1] % group.group == 0 and share < group.sparsity + 0.01 and group.satisfied(weight):
            return str(group)
    return f"{100 * share:.6g}%"
