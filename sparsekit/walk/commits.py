"""Finished blocks on disk: each is committed whole or not at all, so that a kill costs one block."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsekit.model import Block
from sparsekit.system import commit, committed, forget, pack, write_tensors


class Commits:
    """The folder of committed blocks: NNNNN.safetensors with weights, masks (packed bits), records and notes.

    Other parameters, such as norms and biases, are in it where the block says that they were trained.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._intact: dict[int, bool] = {}  # those whose digests were looked at

    def done(self) -> set[int]:
        """The indices of the committed blocks; one that is damaged is named in a warning and is none."""
        found = {int(file.stem) for file in self.folder.glob("[0-9]*.safetensors")}
        for index in found - self._intact.keys():
            self._intact[index] = committed(self._file(index))
        return {index for index in found if self._intact[index]}

    def commit(self, block: Block) -> None:
        """Write a finished block: aside, synced, then renamed into place.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, linear in block.linears.items():
            tensors[f"{name}.weight"] = linear.stored(linear.weight).to("cpu")
            tensors[f"{name}.mask"] = pack(block.masks[name])
        for inner in sorted(block.trained):
            parameter = block.module.get_parameter(inner).detach()
            tensors.setdefault(f"{block.name}.{inner}", parameter.to("cpu").contiguous())
        said = {key: json.dumps(getattr(block, key)) for key in ("records", "notes")}
        said["trained"] = json.dumps(sorted(block.trained))
        commit(self._file(block.index), lambda aside: write_tensors(aside, tensors, said))
        self._intact[block.index] = True

    def forget(self) -> None:
        """Remove the committed blocks."""
        for file in self.folder.glob("[0-9]*.safetensors"):
            forget(file)
        self._intact.clear()

    @torch.no_grad()
    def restore(self, block: Block) -> None:
        """Put a committed block's weights and records back; its masks stay on disk."""
        with safe_open(self._file(block.index), framework="pt") as handle:
            said = {key: json.loads(value) for key, value in handle.metadata().items()}
            block.records, block.notes, block.trained = said["records"], said["notes"], set(said["trained"])
            stored = {f"{name}.weight" for name in block.linears}
            for name, linear in block.linears.items():
                weight = handle.get_tensor(f"{name}.weight")
                linear.write(weight.t() if linear.transposed else weight)
            for inner in block.trained:
                if (key := f"{block.name}.{inner}") not in stored:
                    block.module.get_parameter(inner).copy_(handle.get_tensor(key))

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A committed block's masks as packed bits, by the names of its linears."""
        with safe_open(self._file(block.index), framework="pt") as handle:
            return {name: handle.get_tensor(f"{name}.mask") for name in block.linears}

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"
