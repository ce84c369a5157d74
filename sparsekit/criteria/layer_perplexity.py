"""Layer perplexity (Shortened LLaMA): layers without which the model predicts the calibration text best are removed."""

import math
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from sparsekit.measure import perplexity
from sparsekit.model.structure import Units, masking, share
from sparsekit.run import Work
from sparsekit.walk import Once

KINDS = {"layers": ["layers"], "parts": ["attention", "mlp"]}


def layer_perplexity(
    work: Work, *, remove: str | float, units: Literal["layers", "parts"] = "layers", iterative: bool = False
) -> tuple[LightningModule, Any, list[Callback]]:
    """Remove the layers without which the loss on the calibration text is lowest, each left out by itself.

    remove: share of the blocks' parameters, such as "30%"; as many layers as it takes
    units: layers, as published; parts: whole attentions and MLPs, all compete
    iterative: after each removal the loss without each of the others is measured anew (BlockPruner)

    Source: Kim et al. 2024, Shortened LLaMA: A Simple Depth Pruning for Large Language Models, arXiv:2402.02834
    (iterative: Zhong et al. 2024, BlockPruner, arXiv:2406.10594).
    Cost: a forward pass of the calibration text for each layer or part; iterative: again for each one that goes.
    """
    if units not in KINDS:
        raise ValueError(f"units is {units!r}; layer-perplexity can remove {' or '.join(KINDS)}")
    found, ending = work.removal(remove, KINDS[units], budgets="joint")
    measure = greedy if iterative else scores
    return Once(partial(measure, work, found, remove)), Once.data(), [ending]


def scores(work: Work, units: Units, remove: str | float, device: torch.device) -> Tensor:
    """The calibration loss (units,) without each unit alone, in nats a token; higher is better.

    remove: of no influence here
    """
    return _without(work, units, torch.ones(len(units), dtype=torch.bool), device)


def greedy(work: Work, units: Units, remove: str | float, device: torch.device) -> Tensor:
    """Scores (units,) by removing one unit after another, always the one whose loss is lowest then.

    Those that go are numbered from below: -n, ..., -1; the rest have their loss at the last measurement.
    """
    kept = torch.ones(len(units), dtype=torch.bool)
    found, order = torch.zeros(len(units)), []
    goal = math.ceil(share(remove) * units.total - 1e-6)  # as in `choose`
    while int(units.parameters[~kept].sum()) < goal:
        found = _without(work, units, kept, device)
        order.append(int(found.masked_fill(~kept, math.inf).argmin()))
        kept[order[-1]] = False
    found[order] = torch.arange(-len(order), 0).float()
    return found


def _without(work: Work, units: Units, kept: Tensor, device: torch.device) -> Tensor:
    """The loss (units,) without each unit that is kept; 0 for those that are not."""
    found = torch.zeros(len(units))
    with masking(work.blocks, units) as mask:
        for index in kept.nonzero().flatten().tolist():
            one_less = kept.clone()
            one_less[index] = False
            mask(one_less)
            found[index] = loss(work, device)
    work.model.to("cpu")
    return found


def loss(work: Work, device: torch.device) -> float:
    """The mean loss of the model, as it runs now, on the calibration tokens; one that is not a number counts as 1e4."""
    tokens = work.tokens[work.team.rank :: work.team.size]
    mine = math.log(perplexity(work.model, tokens, batch=work.planned.batch, device=device))
    sums = torch.tensor([mine * len(tokens), float(len(tokens))], device=device)
    work.team.sum([sums])
    return float((sums[0] / sums[1]).nan_to_num(nan=1e4).clamp(max=1e4))
