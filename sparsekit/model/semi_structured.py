"""2:4 linears as torch's semi-structured tensors, which sparse tensor cores of NVIDIA (Ampere and later) multiply."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.linears import all_linears

HALF = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # of which both sides of a half precision matrix must be multiples (cuSPARSELt, CUTLASS)


def two_of_four(model: nn.Module) -> list[str]:
    """The linears of which at most two of every four neighbours are not zero, with sides that tensor cores take."""
    return [
        name
        for name, linear in all_linears(model).items()
        if isinstance(linear.module, nn.Linear) and _fits(linear.weight) and _is_two_of_four(linear.weight)
    ]


def _fits(weight: Tensor) -> bool:
    return weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0


def _is_two_of_four(weight: Tensor) -> bool:
    return bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


def make_semi_structured(model: Any) -> list[str]:
    """Put semi-structured tensors in place of a model's 2:4 weights, on its device, for inference; their names.

    Raises:
        ValueError: the model is not on CUDA, not in half precision, or has no linear that is 2:4.
    """
    if model.device.type != "cuda":
        raise ValueError(
            "sparse=True is for CUDA, whose tensor cores multiply 2:4, and this model is on "
            f"{model.device.type}: give device='cuda' on a machine that has it, or leave it out"
        )
    if model.dtype not in HALF:
        raise ValueError(f"sparse=True needs float16 or bfloat16, and the model is in {model.dtype}: give a dtype")
    names = two_of_four(model)
    if not names:
        raise ValueError("sparse=True, and no linear of the model is 2:4 with sides that tensor cores take")
    for name in names:
        module: Any = model.get_submodule(name)
        tensor = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
        module.weight = nn.Parameter(tensor, requires_grad=False)
    return names
