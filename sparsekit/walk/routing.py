"""What routers and experts do on the calibration text: tokens, weights and outputs of each expert."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekit.maths import double, home_of_double
from sparsekit.model import Block
from sparsekit.model.structure import Units
from sparsekit.system import Team
from sparsekit.walk.stream import BlockStream


@dataclass
class Routed:
    """Sums over the tokens that are sent to each expert of a block (experts,), float64.

    count: the tokens; norms: of the expert's outputs; weighted: of the router's weight times the output's norm
    """

    count: Tensor
    norms: Tensor
    weighted: Tensor

    def add(self, index: int, weights: Tensor, outputs: Tensor) -> None:
        """Add an expert's tokens: weights (tokens,), outputs (tokens, hidden)."""
        norms = double(outputs).norm(dim=-1)
        self.count[index] += len(norms)
        self.norms[index] += norms.sum()
        self.weighted[index] += (double(weights) * norms).sum()


@torch.no_grad()
def routed(stream: BlockStream, units: Units, team: Team) -> Iterator[tuple[int, Routed]]:
    """Walk over the blocks: the number of each part of experts, and what its experts did.

    Raises:
        ValueError: an expert's outputs contain NaN or Inf.
    """
    numbers = {part.home: number for number, part in enumerate(units.parts)}
    for block in stream:
        assert block is not None
        block.to(stream.device)
        found = {name: _watch(block, name, stream.device) for name in block.experts}
        for index, chunk in enumerate(stream.inputs):
            stream.inputs[index] = block(chunk)
        for name, sums in found.items():
            block.experts[name].observer = None
            team.sum([sums.count, sums.norms, sums.weighted])
            if not sums.weighted.isfinite().all():
                raise ValueError(
                    f"experts of {block.name} give NaN or Inf; run the model in float32 or bfloat16, or look at the "
                    "block before"
                )
            if (number := numbers.get(f"{block.name}.{name}")) is not None:
                yield number, sums
        block.to("cpu")
    stream.close()


def _watch(block: Block, name: str, device: torch.device) -> Routed:
    experts = block.experts[name]
    sums = Routed(*(torch.zeros(experts.count, dtype=torch.float64, device=home_of_double(device)) for _ in range(3)))
    experts.observer = partial(Routed.add, sums)
    return sums


def by_expert(stream: BlockStream, units: Units, team: Team, of: str) -> Tensor:
    """A score for each unit (units,): `count`, `norms`, or `mean`, the weighted norm of an expert's mean token."""
    found = torch.zeros(len(units))
    for number, sums in routed(stream, units, team):
        mean = sums.weighted / sums.count.clamp(min=1)
        found[units.part == number] = {"count": sums.count, "norms": sums.norms, "mean": mean}[of].float().cpu()
    return found
