"""The processes that walk together: who solves what, sums over all of them, answers from one of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as distributed
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`. Alone (the default) everything is its own, and nothing is sent."""

    rank: int = 0
    size: int = 1

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Who does what: the costliest first, each to the process that has least to do. The same in every process.

        >>> Team(size=2).owners({"q": 1, "k": 1, "o": 2, "down": 5})
        {'down': 0, 'o': 1, 'q': 1, 'k': 1}
        """
        load, owners = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in all of them."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def send(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor by the one that process `owner` has."""
        if self.size > 1:
            distributed.broadcast(tensor, owner)

    def rows(self, count: int) -> slice:
        """Those of `count` rows that are this process's, in one piece; none where there are too few.

        >>> [Team(rank, 3).rows(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def join(self, mine: Tensor, count: int) -> Tensor:
        """The matrix of `count` rows of which every process has its `rows`."""
        if self.size == 1:
            return mine
        whole = mine.new_empty(count, mine.shape[1])
        whole[self.rows(count)] = mine
        for rank in range(self.size):
            part = whole[Team(rank, self.size).rows(count)]
            if len(part):
                self.send(part, rank)
        return whole

    def tell(self, value: Any, owner: int) -> Any:
        """A value of plain types that process `owner` has."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, owner)
        return box[0]
