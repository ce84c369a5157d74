"""The zeros of a source that is sparse already: recovery holds them as it holds those of a stage before it."""

from typing import Any

import torch
from torch import Tensor

from sparsekit.maths import NM
from sparsekit.model import Block
from sparsekit.system import pack

SHARE = 0.05  # of exact zeros in a linear, from which on they were meant
GROUPS = (NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8))


class SourceZeros:
    """The masks and records of a model that was pruned by nobody knows whom; what `Before` is for a run of ours.

    A linear counts as pruned where more than 5 % of its weights are exact zeros, or they have an n:m pattern.
    """

    def __init__(self, blocks: list[Block]):
        self.patterns = {
            name: found
            for block in blocks
            for name, linear in block.linears.items()
            if (found := _pattern(linear.weight.detach())) is not None
        }
        weights = [linear.weight for block in blocks for linear in block.linears.values()]
        self.share = sum(int((w == 0).count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A block's masks as packed bits, by the names of its linears."""
        return {
            name: pack(linear.weight != 0 if name in self.patterns else torch.ones(linear.shape, dtype=torch.bool))
            for name, linear in block.linears.items()
        }

    def records(self, block: Block) -> dict[str, dict[str, Any]]:
        """As `Block.records` has them."""
        found = {}
        for name, linear in block.linears.items():
            if name in self.patterns:
                zeros, parameters = int((linear.weight == 0).count_nonzero()), linear.weight.numel()
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
