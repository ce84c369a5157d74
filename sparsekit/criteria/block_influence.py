"""Block influence (ShortGPT): layers whose outputs point where their inputs did are removed."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsekit.model.structure import Units
from sparsekit.run import Work
from sparsekit.walk import Once, need


def block_influence(work: Work, *, remove: str | float) -> tuple[LightningModule, Any, list[Callback]]:
    """Remove the layers that turn the hidden states least: smallest 1 - cos(input, output), mean over tokens.

    remove: share of the blocks' parameters, such as "30%"; as many layers as it takes

    Source: Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect,
    arXiv:2403.03853.
    Cost: one pass over the dense model.
    """
    units, ending = work.removal(remove, ["layers"])
    return Once(partial(scores, work, units, remove)), Once.data(), [ending]


@torch.no_grad()
def scores(work: Work, units: Units, remove: str | float, device: torch.device) -> Tensor:
    """The influence (units,) of each layer in the dense model, from 0 to 2; higher is better.

    remove: of no influence here
    """
    need(units, ("layers",), "block-influence")
    found = torch.zeros(len(units))
    stream = work.through(device)
    for block in stream:
        block.to(device)
        sums = torch.zeros(2, device=device)  # of cosines, of tokens
        for index, chunk in enumerate(stream.inputs):
            out = block(chunk)
            cosines = cosine_similarity(chunk.to(device).float(), out.float(), dim=-1)  # (sequences, length)
            sums += torch.stack([cosines.sum(), sums.new_tensor(cosines.numel())])
            stream.inputs[index] = out
        work.team.sum([sums])
        found[units.block == block.index] = float(1 - sums[0] / sums[1])
        block.to("cpu")
    stream.close()
    return found
