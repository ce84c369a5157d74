"""Masks as random variables: the probabilities that units are kept, their start, their budget, and their gradient.

Source: Bypass Back-propagation, Optimization-based Structural Pruning via Policy Gradient, Eq. 2 to 8, A.1, A.11, A.12.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsekit.model.structure import Units

HALVINGS = 60  # of bisections, in float64
EXACT = 1e-13  # share of a budget that counts as met
INSIDE = 1e-6  # probabilities are this far from 0 and 1 where their logarithm is taken


@dataclass(frozen=True)
class Groups:
    """What one probability stands for: a unit, or several of one part. `number` (units,) is the group of each unit."""

    number: Tensor
    count: int

    @classmethod
    def by_score(cls, units: Units, scores: Tensor, size: int) -> "Groups":
        """Channels with neighbouring scores (units,), `size` in a group; every other unit is a group of its own."""
        number, count = torch.empty(len(units), dtype=torch.long), 0
        for index, part in enumerate(units.parts):
            mine = (units.part == index).nonzero().flatten()
            each = size if part.columns.shape[1] == 1 else 1  # single channels
            order = torch.argsort(scores[mine], stable=True)
            number[mine[order]] = count + torch.arange(part.count) // each
            count += -(-part.count // each)
        return cls(number, count)

    def sum(self, values: Tensor) -> Tensor:
        """Of the values (units,) in each group (groups,)."""
        return torch.zeros(self.count, dtype=values.dtype).index_add_(0, self.number, values)

    def mean(self, values: Tensor) -> Tensor:
        """The same, divided by the group's size."""
        return self.sum(values) / self.sum(torch.ones_like(values))


@dataclass(frozen=True)
class Budget:
    """Groups `members` (bool, groups,) may keep `limit` of their weight (groups,) in expectation."""

    members: Tensor
    weight: Tensor
    limit: float

    @cached_property
    def where(self) -> Tensor | slice:
        """The members' indices."""
        return slice(None) if self.members.all() else self.members.nonzero().flatten()

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, float, float]:
        """The members' weights, their squares, their sum and the least of them."""
        mine = self.weight[self.where]
        return mine, mine.square(), float(mine.sum()), float(mine.min())

    def project(self, values: Tensor, low: float, high: float, limit: float | None = None) -> Tensor:
        """The nearest point to `values` (groups,) with sum(weight s) <= limit and low <= s <= high, for the members.

        s = clamp(z - v w) with v >= 0 (Wang and Carreira-Perpinan 2013, arXiv:1309.1541); v is the root of a function
        that is piecewise linear and falls, which Newton's method finds exactly once it is on the right piece; a
        bracket keeps it from leaving. Where `low` alone exceeds the limit, the limit gives way.

        limit: another one than the budget's own
        """
        mine, (weight, squares, total, smallest) = values[self.where].double(), self.weights
        limit = max(self.limit if limit is None else limit, low) * total
        least, most = 0.0, float(mine.max() - low) / smallest + 1
        shift = 0.0
        for _ in range(HALVINGS):
            shifted = mine.sub(weight, alpha=shift)
            kept = shifted.clamp(low, high)
            excess = float(kept @ weight) - limit
            if abs(excess) <= EXACT * total or (excess < 0 and not shift):
                break
            least, most = (shift, most) if excess > 0 else (least, shift)
            slope = float(squares @ (kept == shifted).double())
            ahead = shift + excess / slope if slope else least
            shift = ahead if least < ahead < most else (least + most) / 2
        result = values.clone()
        result[self.where] = kept.to(values)
        return result


def budgets(units: Units, groups: Groups, keep: Tensor, shape: str, joint: bool) -> list[Budget]:
    """One for each kind, one for all, or with shape uniform one for each part.

    keep: the mask (units,) that was chosen at the start: it has the number of units that may be kept
    """
    parameters = units.parameters.double()
    weight, kept = groups.sum(parameters), groups.sum(parameters * keep)
    if joint:
        sets = [torch.ones(groups.count, dtype=torch.bool)]
    elif shape == "uniform":
        sets = [groups.sum((units.part == number).double()) > 0 for number in range(len(units.parts))]
    else:
        sets = [groups.sum(units.of(kind).double()) > 0 for kind in units.kinds]
    return [Budget(each, weight, float(kept[each].sum() / weight[each].sum())) for each in sets]


def sigmoid_norm(
    units: Units,
    groups: Groups,
    scores: Tensor,
    allowed: list[Budget],
    *,
    across: str = "block",
    sharpness: float = 1.0,
    ranks: bool = False,
) -> Tensor:
    """Probabilities (groups,) from scores (units,): z-scores, through a sigmoid, moved into the budget.

    across: z-scores are taken in each part of each block, as published, so that only the order inside a block counts;
        model: over all parts of a kind, for scores that can be compared between blocks
    sharpness: 1 is the paper's Eq. A10; larger ones are nearer to the mask that the scores alone would choose.
    ranks: z is what a normal variable of that rank has. One outlier, such as a first layer without which the loss is
        tenfold, would leave all others the same z-score.
    """
    z = torch.zeros(groups.count, dtype=torch.float64)
    means = groups.mean(scores.double())
    which, count = (units.part, len(units.parts)) if across == "block" else (units.kind, len(units.kinds))
    for number in range(count):
        mine = groups.sum((which == number).double()) > 0
        if ranks:
            places = means[mine].argsort(stable=True).argsort()
            z[mine] = torch.special.ndtri((places.double() + 0.5) / len(places))
            continue
        spread = means[mine].std() if int(mine.sum()) > 1 else torch.tensor(0.0)
        z[mine] = (means[mine] - means[mine].mean()) / (spread if spread > 0 else 1.0)
    start = torch.empty_like(z)
    for budget in allowed:
        mine, weight = budget.members, budget.weight[budget.members].double()
        low, high = -1e3, 1e3
        for _ in range(HALVINGS * 2):
            middle = (low + high) / 2
            share = float((torch.sigmoid(sharpness * (z[mine] + middle)) * weight).sum() / weight.sum())
            low, high = (low, middle) if share > budget.limit else (middle, high)
        start[mine] = torch.sigmoid(sharpness * (z[mine] + low))
    return start


def score_const(groups: Groups, keep: Tensor, constant: float = 0.8) -> Tensor:
    """Probabilities (groups,): `constant` where the mask (units,) keeps, 1 - constant elsewhere (Eq. A11)."""
    return (1 - constant) + (2 * constant - 1) * groups.mean(keep.double())


def sample(probabilities: Tensor, count: int, generator: torch.Generator, antithetic: bool = False) -> Tensor:
    """Masks (count, groups) of zeros and ones. antithetic: each second one from the opposite random numbers."""
    shape = (math.ceil(count / 2) if antithetic else count, len(probabilities))
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if antithetic:
        uniform = torch.stack([uniform, 1 - uniform], 1).flatten(0, 1)[:count]
    return (uniform < probabilities.detach().cpu().double()).double()


def leave_one_out(losses: Tensor, antithetic: bool = False) -> Tensor:
    """For each mask the mean loss (..., count) of those drawn independently of it; NaN where there are none.

    losses: (..., count); what is not finite is no loss and in no mean. antithetic: as in `sample`; a mask's opposite
        shares its random numbers, and with its loss in the mean the gradient would be biased, in each coordinate by
        the factor 1 + min(s, 1 - s) / max(s, 1 - s) / (count - 1)
    """
    draws = torch.arange(losses.shape[-1]) // (2 if antithetic else 1)
    others = (draws[:, None] != draws).to(losses)  # (count, count)
    known = losses.isfinite()
    return (losses.masked_fill(~known, 0.0) @ others) / (known.to(losses) @ others)


def log_probability(probabilities: Tensor, masks: Tensor) -> Tensor:
    """log p(m | s) (count,), Eq. 2, differentiable in the probabilities (groups,)."""
    s = probabilities.clamp(INSIDE, 1 - INSIDE)
    return (masks * s.log() + (1 - masks) * torch.log1p(-s)).sum(-1)


def surrogate(probabilities: Tensor, masks: Tensor, advantages: Tensor) -> Tensor:
    """A loss whose gradient is the score-function estimator: the mean of (L_k - baseline) grad log p(m_k), Eq. 7."""
    return (advantages.detach() * log_probability(probabilities, masks)).mean()
