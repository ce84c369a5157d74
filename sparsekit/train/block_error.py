"""How far a block's outputs are from what should leave it, token by token and channel by channel."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsekit.model import Block
from sparsekit.system import Team

FLOOR = 0.1  # share of the mean energy, in logarithms, below which no token or channel is looked at more closely


class Chunks(Protocol):
    """An ActivationStore, or any sequence of tensors (sequences, length, hidden)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass
class BlockError:
    """How far a block's outputs are from what should leave it.

    per_token: relative to the energy of the token. channels: alike, by their energy, or the weight of each (hidden,)
    floor: energy of a token, a mean square, to which errors are relative at least
    weights: of the channels (hidden,), where errors are relative to theirs
    """

    block: Block
    inputs: Chunks
    targets: Chunks
    team: Team
    per_token: bool
    channels: str | Tensor = "alike"
    floor: float = 0.0
    weights: Tensor | None = None

    def pairs(self, order: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunks in an order of one's own; the next pair is read while the caller works on this one."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = None
            for index in order:
                now, ahead = ahead, reader.submit(lambda i: (self.inputs[i], self.targets[i]), index)
                if now is not None:
                    yield now.result()
            if ahead is not None:
                yield ahead.result()

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over the processes."""
        if self.team.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        self.team.sum([sums])
        return list(sums.tolist())

    def counts(self) -> list[int]:
        """How many chunks each process has."""
        own = [len(self.inputs) * (rank == self.team.rank) for rank in range(self.team.size)]
        return [int(count) for count in self.sum(*own)]

    def weighed(self, difference: Tensor, y: Tensor) -> Tensor:
        """Squares, over the energies of channels and of their token's target where errors are relative to these."""
        squares = self._of_channels(difference)
        if not self.per_token:
            return squares
        energy = self._of_channels(y.to(difference)).mean(self.block.channels, keepdim=True).clamp(min=self.floor)
        return squares * torch.where(energy > 0, 1 / energy, 0)

    def _of_channels(self, values: Tensor) -> Tensor:
        if self.weights is None:
            return values.square()
        shape = [1] * values.dim()
        shape[self.block.channels] = -1
        return values.square() * self.weights.to(values).view(shape)

    def mean_square(self) -> float:
        """Of the targets, relative as errors are; sets `floor` and `weights`.

        Raises ValueError for chunks that do not fit together.
        """
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs)} chunks of inputs and {len(self.targets)} of targets; give equally many"
            )
        if isinstance(self.channels, Tensor):
            self.weights = self.channels
        elif self.channels == "energy":
            self.weights = self._channel_weights()
        energies = []
        for index, (x, y) in enumerate(self.pairs(range(len(self.inputs)))):
            if x.shape[0] != y.shape[0] or (not self.block.scale and x.shape != y.shape):
                raise ValueError(f"chunk {index}: inputs {tuple(x.shape)}, targets {tuple(y.shape)}; make them equal")
            if not (x.isfinite().all() and y.isfinite().all()):
                raise ValueError(f"chunk {index} contains NaN or Inf, so a block cannot be trained on it")
            energies.append(self._of_channels(y.float()).mean(self.block.channels).flatten().cpu().double())
        energy = torch.cat(energies or [torch.zeros(0)])
        if self.per_token:
            self.floor = self._least(energy)
            energy = energy / energy.clamp(min=self.floor or 1.0)
        total, count = self.sum(float(energy.sum()), len(energy))
        return total / max(count, 1) or 1.0

    def _least(self, energy: Tensor) -> float:
        """A tenth of the geometric mean of the energies that are there, over all processes."""
        there = energy[energy > 0].log()
        logs, count = self.sum(float(there.sum()), len(there))
        return FLOOR * math.exp(logs / max(count, 1)) if count else 0.0

    def _channel_weights(self) -> Tensor:
        """One over each channel's mean share of its token's energy (hidden,), a tenth of the typical share at least."""
        shares, count = torch.zeros(()), 0.0
        for index in range(len(self.targets)):
            squares = self.targets[index].float().cpu().square()
            squares = squares.movedim(self.block.channels, -1).flatten(0, -2)  # (tokens, hidden)
            energy = squares.mean(-1, keepdim=True)
            shares = shares + torch.where(energy > 0, squares / energy, 0).sum(0, dtype=torch.float64)
            count += len(squares)
        if self.team.size > 1:
            self.team.sum([shares])
            [count] = self.sum(count)
        shares = shares / max(count, 1)
        there = shares[shares > 0].log()
        least = FLOOR * float(there.mean().exp()) if len(there) else 1.0
        return (1 / shares.clamp(min=least)).float()

    def squared(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The squared error (a sum) of the block with these parameters on one chunk, in float32 or wider."""
        out = self.block.with_parameters(parameters, x, dtype)
        wide = torch.promote_types(out.dtype, torch.float32)
        y = y.to(out.device, wide)
        return self.weighed(out.to(wide) - y, y).sum()

    @torch.no_grad()
    def error(self, parameters: dict[str, Tensor], order: list[int]) -> float:
        """The mean squared error over the chunks `order`, in the dtypes in which the block is stored."""
        total, count = 0.0, 0.0
        for x, y in self.pairs(order):
            total, count = total + float(self.squared(parameters, x, y)), count + y.numel()
        total, count = self.sum(total, count)
        return total / count
