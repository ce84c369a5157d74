"""Block influence (ShortGPT): layers whose outputs point where their inputs did are removed."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsekit.contracts import Context, scores
from sparsekit.model.structure import Units


@scores("layers", reads=("text", "images"))
@torch.no_grad()
def block_influence(context: Context, units: Units, *, remove: float) -> Tensor:
    """Remove the layers that turn the hidden states least: smallest 1 - cos(input, output), mean over tokens.

    The scores are from 0 to 2; as many layers go as it takes.

    Source: Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect,
    arXiv:2403.03853.
    Cost: one pass over the dense model.
    """
    found = torch.zeros(len(units))
    stream = context.through()
    for block in stream:
        block.to(stream.device)
        sums = torch.zeros(2, device=stream.device)  # of cosines, of tokens
        for index, chunk in enumerate(stream.inputs):
            out = block(chunk)
            if not out.isfinite().all():
                raise ValueError(f"what leaves {block.name} contains NaN or Inf; run the model in float32 or bfloat16")
            cosines = cosine_similarity(chunk.to(stream.device).float(), out.float(), dim=-1)  # (sequences, length)
            sums += torch.stack([cosines.sum(), sums.new_tensor(cosines.numel())])
            stream.inputs[index] = out
        context.team.sum([sums])
        found[units.block == block.index] = float(1 - sums[0] / sums[1])
        block.to("cpu")
    stream.close()
    return found
