"""Mean and spread of what enters linears, column by column: all that the quick structural scores need of it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparsekit.model import Block
from sparsekit.model.structure import Part, Units
from sparsekit.system import ActivationStore, Team
from sparsekit.walk.stream import BlockStream


class Moments:
    """Of the tokens (..., in) that were added: their count, and for each column (in,) its mean and spread.

    Batches are pooled by means and squared deviations (Chan, Golub & LeVeque 1979): each counts by its tokens, and no
    variance is a difference of large sums.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> moments.add(torch.tensor([[8.0, 5.0]]))
    >>> moments.mean, moments.variance
    (tensor([4., 5.]), tensor([13.,  0.]))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.deviations: Tensor = torch.zeros(())  # sum (x - mean)^2

    @property
    def variance(self) -> Tensor:
        """The unbiased variance (in,)."""
        return self.deviations / max(self.count - 1, 1)

    @property
    def size(self) -> Tensor:
        """The root mean square (in,)."""
        return (self.deviations / max(self.count, 1) + self.mean.square()).sqrt()

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add tokens (..., in); in float32 at least, on their device."""
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        self._pool(len(x), mean, (x - mean).square().sum(0))

    def _pool(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        if not self.count:
            self.mean, self.deviations = torch.zeros_like(mean), torch.zeros_like(mean)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.deviations = self.deviations + deviations + delta.square() * (self.count * count / total)
        self.count = total

    def share(self, team: Team) -> None:
        """Pool them over the processes of a team, each of which saw other tokens."""
        if team.size == 1:
            return
        count, total = torch.tensor(float(self.count), device=self.mean.device), self.mean * self.count
        team.sum([count, total])
        mean = total / count
        self.deviations = self.deviations + (self.mean - mean).square() * self.count
        team.sum([self.deviations])
        self.mean, self.count = mean, int(count)


@torch.no_grad()
def moments(
    block: Block,
    chunks: ActivationStore,
    names: Iterable[str],
    *,
    advance: bool = False,
    team: Team = Team(),  # noqa: B008
) -> dict[str, Moments]:
    """Of what enters the linears `names` of a block, by their names, in one pass.

    chunks: what enters the block; advance: its outputs take their place, so that they enter the next one
    team: the processes that share the sequences out

    Raises:
        ValueError: NaN or Inf enters a linear.
    """
    found = {name: Moments() for name in names}
    groups = {number: name for name in found for number, group in enumerate(block.groups) if name in group}
    for index, chunk in enumerate(chunks):
        if advance:
            with block.watching(groups, lambda group, inputs: found[groups[group]].add(inputs)):
                chunks[index] = block(chunk)
        else:
            block.until(chunk, list(groups), lambda group, inputs: found[groups[group]].add(inputs))
    for name, each in found.items():
        each.share(team)
        if not each.deviations.isfinite().all():
            raise ValueError(
                f"activations entering {name} contain NaN or Inf; run the model in float32 or bfloat16, or look at the "
                "block before"
            )
    return found


@torch.no_grad()
def walked(
    stream: BlockStream,
    units: Units,
    *,
    masked: bool = False,
    team: Team = Team(),  # noqa: B008
) -> Iterator[tuple[Block, dict[int, Part], dict[str, Moments]]]:
    """Walk over the blocks: each block, its parts by their numbers in `units`, and the moments of what enters their
    output linears, by the linears' names. The block is on the stream's device meanwhile.

    masked: the outputs of a block are computed when the caller is done with it, as it has masked it by then; it costs
        a second pass
    """
    for block in stream:
        assert block is not None
        block.to(stream.device)
        parts = {number: part for number, part in enumerate(units.parts) if part.block == block.index}
        names = [str(part.output) for part in parts.values()]
        yield block, parts, moments(block, stream.inputs, names, advance=not masked, team=team)
        if masked:
            stream.advance(block)
        block.to("cpu")
    stream.close()
