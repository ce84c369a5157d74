"""Fisher: structures by the loss's curvature in a mask over them, looked at anew as they go."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, Count, scores
from sparsekit.model.structure import Units, choose, gating, masking
from sparsekit.train import backward, frozen

# whatever has a gate, and is compared with all else that has one: see `gating`
by_gates = scores(
    "heads",
    "channels",
    "mamba",
    "attention",
    "mlp",
    "layers",
    removes=("heads", "channels"),
    budgets="joint",
    gradients=True,
    reads=("text", "images"),
)


@by_gates
def fisher(context: Context, units: Units, *, remove: float, rounds: Count = 10) -> Tensor:
    """Remove the units whose gates the loss bends least in, a few at a time.

    A gate m_i of 1 multiplies what unit i gives. To second order the loss rises by 1/2 F_ii where m_i becomes 0, with F
    the Fisher information of the gates: F_ii is the mean over sequences of (d loss / d m_i)^2, the loss the mean over a
    sequence's tokens. A unit scores F_ii over the parameters that go with it. After each round the worst units are out,
    and the next round looks at the model without them. Of vision models the loss is that of the class which the model
    itself finds likeliest, or, where it names none, the energy of its features.

    rounds: the share that is out grows evenly from one to the next; 1 is the published mask search without its
        rearrangement, and all gradients are of the whole model

    Source: Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, arXiv:2204.09656, section 4.1:
    the diagonal; there a unit's cost is in operations, here in parameters. The rounds are ours.
    Cost: a forward and a backward pass of the calibration text for each round, one sequence at a time. Memory: the
    activations of one sequence, as in training.
    """
    found = torch.zeros(len(units))
    kept = torch.ones(len(units), dtype=torch.bool)
    for number in range(rounds):
        curvature = gate_curvature(context, units, kept) / units.parameters
        ranks = torch.empty(len(units))
        ranks[curvature.argsort(stable=True)] = torch.arange(len(units)) / len(units)
        found = torch.where(kept, number + 1 + ranks, found)  # what went earlier is below
        if number + 1 < rounds:
            kept = choose(units, found, remove * (number + 1) / rounds, budgets="joint")
    return found


def gate_curvature(context: Context, units: Units, kept: Tensor) -> Tensor:
    """The Fisher information of the gates of the model under a mask (units,), float64, on the CPU; 0 of what is out."""
    model, device = context.model, context.device
    tokens = context.tokens[context.team.rank :: context.team.size]
    total = torch.zeros(len(units), dtype=torch.float64)
    model.to(device)
    try:
        with frozen(model), masking(context.blocks, units) as mask, gating(context.blocks, units, device) as gates:
            mask(kept)
            for sequence in tokens.split(1):
                backward(model, sequence.to(device))
                if gates.grad is not None:  # no unit is left that counts
                    total += gates.grad.double().square().cpu()
                    gates.grad = None
    finally:
        model.to("cpu")
    count = torch.tensor(float(len(tokens)))
    context.team.sum([total, count])
    return total / count * kept
