"""Gumbel: structures by a mask that is learned with gradients, drawn anew in every step."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, Count, Positive
from sparsekit.criteria.fisher import by_gates, gate_curvature
from sparsekit.model.structure import Units, choose, gating
from sparsekit.train import backward, frozen


@by_gates
def gumbel(
    context: Context,
    units: Units,
    *,
    remove: float,
    steps: Count = 300,
    batch: Count = 4,
    learning_rate: Positive = 0.01,
    temperature: Positive = 0.5,
) -> Tensor:
    """Remove the units that a mask, learned by gradients of the loss, does without.

    Every unit i has a number s_i, at first the rank of its curvature (see `fisher`, one round) as a normal quantile. In
    a step the units with the lowest s_i + temperature * g_i are out, g_i the difference of two Gumbel draws, so that
    exactly the share `remove` of the parameters goes; gates of 0 and 1 stand before the units, and one backward pass
    of `batch` sequences gives d loss / d gate, of those that are out too. That is carried to s_i as if the gate were a
    sigmoid of (s_i + temperature * g_i - t) / temperature, t the number between what stays and what goes, and counted
    per parameter of the unit. s follows the running mean of these slopes, each step as long as `learning_rate`, the
    root mean square over all units. At the end s is the score.

    steps, batch: the text is gone through as often as that takes
    temperature: of the noise, and of the sigmoid, in standard deviations of the first numbers

    Source: the straight-through Gumbel estimator: Jang, Gu and Poole 2017, arXiv:1611.01144, sections 2.1 and 2.2, with
    the sigmoid of Maddison et al. 2017, arXiv:1611.00712, appendix B. Exact budgets, one size for all slopes, and the
    start are ours.
    Cost: a forward and a backward pass of `batch` sequences for each step, and of the text for the start. Memory: the
    activations of one sequence, as in training; `policy_gradient` needs no backward pass.
    """
    start = gate_curvature(context, units, torch.ones(len(units), dtype=torch.bool)) / units.parameters
    places = torch.empty(len(units), dtype=torch.float64)
    places[start.argsort(stable=True)] = (torch.arange(len(units), dtype=torch.float64) + 0.5) / len(units)
    found, running = torch.special.ndtri(places), torch.zeros(len(units), dtype=torch.float64)
    generator = torch.Generator().manual_seed(context.seed)
    model, device = context.model, context.device
    model.to(device)
    try:
        with frozen(model), gating(context.blocks, units, device) as gates:
            for step in range(steps):
                uniform = torch.rand(len(units), generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
                noisy = found + temperature * torch.logit(uniform)
                kept = choose(units, noisy, remove, budgets="joint")
                with torch.no_grad():
                    gates.copy_(kept)
                for row in _rows(context, step, batch):
                    backward(model, row[None].to(device))
                slope = torch.zeros_like(found) if gates.grad is None else gates.grad.double().cpu()
                gates.grad = None
                context.team.sum([slope])
                border = (noisy[kept].min() + noisy[~kept].max()) / 2
                open_by = torch.sigmoid((noisy - border) / temperature)
                running.mul_(0.9).add_(0.1 * slope * open_by * (1 - open_by) / units.parameters)
                size = running.square().mean().sqrt()
                found = found - learning_rate * running / size if size > 0 else found
    finally:
        model.to("cpu")
    return found


def _rows(context: Context, step: int, batch: int) -> list[Tensor]:
    """The sequences of a step that this process takes: all of the text in a new order, again and again."""
    count = len(context.tokens)
    first = step * batch
    rows = []
    for place in range(first, first + batch):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(context.seed + place // count))
        rows.append(context.tokens[order[place % count]])
    return rows[context.team.rank :: context.team.size]
