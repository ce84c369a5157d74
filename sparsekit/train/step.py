"""What every training loop here shares: gradients of a mean, over chunks and processes, and the best state so far."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsekit.system import Team


def mean_gradients(leaves: Iterable[Tensor], weight: float, team: Team) -> None:
    """Turn gradients of sums into those of the mean, in place.

    leaves: whose gradients are sums over `weight` things (tokens, elements) of this process
    team: processes that hold the same leaves and saw other things; all end with the same gradients

    A mean over all things, not a mean of means: chunks and processes count by how much they saw.
    """
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if team.size > 1:
        total = torch.tensor([weight], dtype=torch.float64)
        team.sum([total])
        team.sum(gradients)
        weight = float(total)
    for gradient in gradients:
        gradient /= max(weight, 1)


class Progress:
    """The smallest value so far, when it was seen, and whether it is long ago.

    patience: looks without a smaller value after which going on is no use; None: never
    """

    def __init__(self, patience: int | None = None, best: float = math.inf):
        self.patience, self.best, self.waited = patience, best, 0

    def better(self, value: float) -> bool:
        """Whether this value is the smallest; NaN never is."""
        self.waited = 0 if value < self.best else self.waited + 1
        self.best = value if value < self.best else self.best
        return self.waited == 0

    @property
    def over(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience
