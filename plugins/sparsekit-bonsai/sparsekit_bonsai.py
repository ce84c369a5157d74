"""Bonsai: which units matter, by a regression on the losses of many random sub-models, as a sparsekit plugin."""

import math
from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import AfterValidator
from sparsekit.contracts import Context, Count, Share, scores, share
from sparsekit.criteria.wanda_sp import sizes
from sparsekit.model.structure import Units, masking
from sparsekit.walk import walked
from torch import Tensor

RIDGES = [10.0**power for power in range(-3, 4)]
FOLDS = 5


def _even(masks: int) -> int:
    if masks % 2:
        raise ValueError(f"is {masks}, must be even: masks are drawn in complementary pairs")
    return masks


@scores("heads", "channels", budgets="joint")
@torch.no_grad()
def bonsai(
    context: Context,
    units: Units,
    *,
    remove: float,
    step: Share = "5%",
    masks: Annotated[int, Ge(2 * FOLDS), AfterValidator(_even)] = 200,
    samples: Count = 32,
) -> Tensor:
    """Remove the KV groups and MLP channels that a linear model of the loss says matter least, a few in each round.

    In a round the units whose weights and activations are smallest, of twice as many parameters as are to go, are
    dropped at random, half of them at a time, and then the other half; those of smaller activations are dropped
    together more often. A ridge regression of the losses on the masks gives each unit's worth. All units of all blocks
    compete. Units that go are numbered from below in the order in which they went; the rest have how large they are
    within their part.

    step: share that goes in a round
    masks: sub-models that are measured in a round, an even number
    samples: sequences of the calibration text that they are measured on, others in every round

    Source: Dery et al. 2024, Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes,
    arXiv:2402.05406.
    Cost: remove / step * masks forward passes of `samples` sequences: minutes for a model of a million parameters,
    hours for one of a hundred million.
    """
    width = share(step)
    draw = torch.Generator().manual_seed(context.seed)
    kept = torch.ones(len(units), dtype=torch.bool)
    order: list[int] = []
    goal, gone = math.ceil(remove * units.total - 1e-6), 0  # as in `choose`
    with masking(context.blocks, units) as mask:
        while gone < goal:
            mask(kept)
            prior = _prior(context, units, kept)
            among = _candidates(units, kept, prior, min(width * units.total, goal - gone))
            text = context.tokens[torch.randperm(len(context.tokens), generator=draw)[:samples]]
            losses, dropped = [], _drops(units, among, prior, masks, draw)  # dropped: (masks, candidates)
            for each in dropped:
                one = kept.clone()
                one[among[each]] = False
                mask(one)
                losses.append(context.loss(text))
            worth = fit(dropped.double(), torch.tensor(losses, dtype=torch.float64))
            target = min(gone + width * units.total, goal)
            for index in among[worth.argsort(stable=True)].tolist():
                if gone >= target:
                    break
                order.append(index)
                kept[index] = False
                gone += int(units.parameters[index])
    context.model.to("cpu")
    found = prior.clone()
    found[order] = torch.arange(-len(order), 0).float()
    return found


def fit(dropped: Tensor, losses: Tensor) -> Tensor:
    """How much each unit adds to the loss when it is dropped (candidates,): ridge regression, ridge by 5-fold trial.

    dropped: 1 where a mask drops a unit (masks, candidates); the second half are the complements of the first, and go
    into the same fold
    """
    fold = torch.arange(len(losses)) % (len(losses) // 2) % FOLDS
    trials = []
    for ridge in RIDGES:
        wrong = 0.0
        for left_out in range(FOLDS):
            seen = fold != left_out
            worth, level = _ridge(dropped[seen], losses[seen], ridge)
            wrong += float((dropped[~seen] @ worth + level - losses[~seen]).square().sum())
        trials.append(wrong)
    return _ridge(dropped, losses, RIDGES[trials.index(min(trials))])[0]


def _ridge(dropped: Tensor, losses: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Slopes (candidates,) and level of the best linear model; solved over masks, which are fewer than units."""
    centre, level = dropped.mean(0), losses.mean()
    x = dropped - centre
    gram = x @ x.t()
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
    slopes = x.t() @ torch.linalg.solve(gram, losses - level)
    return slopes, level - centre @ slopes


def _prior(context: Context, units: Units, kept: Tensor) -> Tensor:
    """How large each unit is (units,) in the model as it is masked now, by Wanda-sp's measure, over its part's mean."""
    found = torch.zeros(len(units))
    for block, parts, seen in walked(context.through(), units, team=context.team):
        for number, part in parts.items():
            mine = units.part == number
            size = sizes(block.linears[str(part.output)], part, seen[str(part.output)])
            found[mine] = size / size[kept[mine]].mean().clamp(min=torch.finfo(size.dtype).tiny)
    return found


def _candidates(units: Units, kept: Tensor, prior: Tensor, parameters: float) -> Tensor:
    """The units that may go in this round (candidates,): of each kind the smallest, twice as many as are to go.

    The largest unit of a part always stays, and it is never less than two of a kind, so that there is a choice.
    """
    free = kept.clone()
    for number in range(len(units.parts)):
        mine = (kept & (units.part == number)).nonzero().flatten()
        free[mine[prior[mine].argmax()]] = False
    found, share_of_left = [], 2 * parameters / float(units.parameters[free].sum())
    for kind in units.kinds:
        left = (free & units.of(kind)).nonzero().flatten()
        count = max(2, math.ceil(share_of_left * len(left)))
        found.append(left[prior[left].argsort(stable=True)][:count])
    return torch.cat(found)


def _drops(units: Units, among: Tensor, prior: Tensor, masks: int, draw: torch.Generator) -> Tensor:
    """Which candidates each mask drops (masks, candidates): half of each kind at random, then the complements."""
    first = torch.zeros(masks // 2, len(among), dtype=torch.bool)
    for kind in units.kinds:
        mine = units.of(kind)[among].nonzero().flatten()
        if not len(mine):
            continue
        urge = prior[among[mine]].max() - prior[among[mine]]
        urge = urge + urge.mean().clamp(min=1e-6)  # the largest candidate goes at times too
        for row in first:
            half = torch.multinomial(urge, max(1, len(mine) // 2), generator=draw)
            row[mine[half]] = True
    return torch.cat([first, ~first])
