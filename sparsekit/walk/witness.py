"""How far the linears of a finished block are from the dense model, where weights are trained after a solver."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekit.model import Block
from sparsekit.system import Team


class Witness:
    """What one chunk gives in a block that is still dense; `errors` tells later how far each linear is from it.

    chunk: what enters the block in the dense model, (sequences, length, hidden)

    Linears of experts are left out, since other tokens may be sent to them. Memory: the outputs of all other linears
    for the chunk, in float32.
    """

    @torch.no_grad()
    def __init__(self, block: Block, chunk: Tensor):
        self.groups = [index for index in range(len(block.groups)) if block.expert_of(index) is None]
        self.outputs: dict[str, Tensor] = {}

        def see(group: int, inputs: Tensor) -> None:
            for name in block.groups[group]:
                self.outputs[name] = _output(block, name, inputs)

        block.until(chunk, self.groups, see)

    @torch.no_grad()
    def errors(self, block: Block, chunk: Tensor, team: Team) -> dict[str, float]:
        """Each linear's relative error ||V x - W x_d||^2 / ||W x_d||^2, W and x_d of the dense model.

        chunk: what enters the block now, for the same tokens. Sums run over the chunks of all processes.
        """
        sums: dict[str, Tensor] = {}

        def see(group: int, inputs: Tensor) -> None:
            for name in block.groups[group]:
                dense = self.outputs.pop(name)
                squares = [(_output(block, name, inputs) - dense).square().sum(), dense.square().sum()]
                sums[name] = torch.stack(squares)

        block.until(chunk, self.groups, see)
        team.sum(sums.values())
        pairs = {name: pair.tolist() for name, pair in sums.items()}
        return {name: lost / energy if energy else float(lost > 0) for name, (lost, energy) in pairs.items()}


def _output(block: Block, name: str, inputs: Tensor) -> Tensor:
    """What a linear makes of its inputs, without its bias, in float32."""
    return linear(inputs.float(), block.linears[name].weight.float())
