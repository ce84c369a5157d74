"""The masks of a finished run."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekit.model import all_linears, skeleton
from sparsekit.results.folder import MASKS
from sparsekit.system import unpack


class Masks(Mapping[str, Tensor]):
    """A linear's name -> the weights (out, in) that a run kept, true where one stays; unpacked when asked for.

    folder: of the run

    Raises:
        ValueError: no run in it pruned weights, or its masks do not fit its model.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.file = folder / MASKS
        if not self.file.is_file():
            raise ValueError(f"{folder} holds no {MASKS}: give the folder of a run that pruned weights")
        shapes = {name: linear.shape for name, linear in all_linears(skeleton(folder / "model")).items()}
        try:
            with safe_open(self.file, framework="pt") as handle:
                sizes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError as error:
            raise ValueError(f"{self.file} is damaged: {error}; restore it") from error
        for name, size in sizes.items():
            if name not in shapes or size != [-(-math.prod(shapes[name]) // 8)]:
                raise ValueError(f"{self.file} has a mask of {name} that does not fit the model beside it")
        self.shapes = {name: shapes[name] for name in sizes}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self.packed(name), self.shapes[name])

    def packed(self, name: str) -> Tensor:
        """A mask as it is stored: eight weights to a byte."""
        with safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def masks(folder: str | Path) -> dict[str, Tensor]:
    """All of `Masks` in memory: a byte a weight. Raises ValueError as it does."""
    return dict(Masks(folder))
