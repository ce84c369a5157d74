"""The masks of a finished run."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sparsekit.model import find_blocks, skeleton
from sparsekit.results.folder import MASKS
from sparsekit.system import unpack


def masks(folder: str | Path) -> dict[str, Tensor]:
    """A linear's name -> the weights (out, in) that a run kept, true where a weight stays.

    folder: of the run

    Raises:
        ValueError: no run in it pruned weights, or its masks do not fit its model.
    """
    folder = Path(folder)
    if not (folder / MASKS).is_file():
        raise ValueError(f"{folder} holds no {MASKS}: give the folder of a run that pruned weights")
    linears = {n: linear for block in find_blocks(skeleton(folder / "model")) for n, linear in block.linears.items()}
    found = {}
    with safe_open(folder / MASKS, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (it is no dict)
            bits = handle.get_tensor(name)
            if name not in linears or bits.numel() != -(-linears[name].weight.numel() // 8):
                raise ValueError(f"{folder / MASKS} has a mask of {name} that does not fit the model beside it")
            found[name] = unpack(bits, linears[name].shape)
    return found
