"""Layer perplexity (Shortened LLaMA): layers without which the model predicts the calibration text best are removed."""

import math
from functools import partial

import torch
from torch import Tensor

from sparsekit.contracts import Context, scores
from sparsekit.measure import losses
from sparsekit.model.structure import Units, masking

BAD = 1e4  # the loss of a model that gives no numbers


@scores("layers", "attention", "mlp", removes=("layers",), budgets="joint")
def layer_perplexity(context: Context, units: Units, *, remove: float, iterative: bool = False) -> Tensor:
    """Remove the layers without which the loss on the calibration text is lowest, each left out by itself.

    The scores are that loss in nats a token. With `units: parts` whole attentions and MLPs compete.

    iterative: after each removal the loss without each of the others is measured anew (BlockPruner). Those that go are
        then numbered from below: -n, ..., -1.

    Source: Kim et al. 2024, Shortened LLaMA: A Simple Depth Pruning for Large Language Models, arXiv:2402.02834
    (iterative: Zhong et al. 2024, BlockPruner, arXiv:2406.10594).
    Cost: half a forward pass of the calibration text for each layer or part, as what is before it is computed once;
    iterative: again for each one that goes. Memory: what enters each block, for one batch.
    """
    kept = torch.ones(len(units), dtype=torch.bool)
    if not iterative:
        return _without(context, units, kept)
    found, order = torch.zeros(len(units)), []
    goal = math.ceil(remove * units.total - 1e-6)  # as in `choose`
    while int(units.parameters[~kept].sum()) < goal:
        found = _without(context, units, kept)
        order.append(int(found.masked_fill(~kept, math.inf).argmin()))
        kept[order[-1]] = False
    found[order] = torch.arange(-len(order), 0).float()
    return found


def _without(context: Context, units: Units, kept: Tensor) -> Tensor:
    """The loss (units,) without each unit that is kept; 0 for those that are not. Infinite ones count as 1e4."""
    tokens = context.tokens[context.team.rank :: context.team.size]
    sums = torch.zeros(len(units) + 1, dtype=torch.float64)  # the last: sequences
    measure = partial(losses, context.model, device=context.device)
    with masking(context.blocks, units) as mask:
        for chunk in tokens.split(context.batch):
            mask(kept)
            mask.entering = {}
            measure(chunk, batch=len(chunk))
            entering, mask.entering = mask.entering, None
            for index in kept.nonzero().flatten().tolist():
                one_less = kept.clone()
                one_less[index] = False
                mask(one_less)
                block = int(units.block[index])
                mask.begin(block, entering[block])
                sums[index] += float(measure(chunk, batch=len(chunk)).sum())
            mask.begin(None)
            sums[-1] += len(chunk)
    context.model.to("cpu")
    total = sums.to(context.device)
    context.team.sum([total])
    return (total[:-1] / total[-1]).cpu().nan_to_num(nan=BAD, posinf=BAD).clamp(max=BAD).float()
