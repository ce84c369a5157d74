"""What a unit's output weighs: an example of a sparsekit criterion."""

import torch
from torch import Tensor

from sparsekit.contracts import Context, Positive, scores
from sparsekit.model.structure import Units


@scores("heads", "channels", shape="uniform")
@torch.no_grad()
def norm_of_columns(context: Context, units: Units, *, remove: float, power: Positive = 2.0) -> Tensor:
    """Remove the heads and channels whose columns in the output linear are smallest.

    power: of the norm

    Source: an example, no paper.
    """
    found = torch.zeros(len(units))
    for number, part in enumerate(units.parts):
        weight = context.blocks[part.block].linears[str(part.output)].weight.float()  # (out, in)
        columns = weight.abs().pow(power).sum(0)  # (in,)
        found[units.part == number] = columns[part.columns].sum(1)
    return found
