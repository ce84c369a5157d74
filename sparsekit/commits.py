"""Finished blocks on disk: each is committed whole or not at all, so that a kill costs one block."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.blocks import Block


class Commits:
    """The folder of committed blocks: NNNNN.safetensors with weights, masks (packed bits), records and notes.

    Other parameters, such as norms and biases, are in it where the block says that they were trained.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def done(self) -> set[int]:
        """The indices of the committed blocks."""
        return {int(file.stem) for file in self.folder.glob("[0-9]*.safetensors")}

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
        write_atomically(self._file(block.index), lambda aside: write_tensors(aside, tensors, said))

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


def pack(mask: Tensor) -> Tensor:
    """Booleans of any shape as bits, eight to a byte."""
    return torch.from_numpy(numpy.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The booleans that `pack` was given, in their shape."""
    count = int(numpy.prod(shape))
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=count)).bool().view(shape)


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file of safetensors, readable as the user's umask says; raises OSError where the disk is full."""
    with disk_errors(file):
        save_file(tensors, file, metadata=metadata)
    make_readable(file)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """The safetensors writer reports a full disk in a type of its own: make it the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def make_readable(file: Path) -> None:
    """Safetensors makes files that only their owner can read; give them what the user's umask says."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(path)` make a file aside, sync it, and rename it to `file`: never half of it is seen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")  # several processes may write into one folder
    try:
        write(aside)
        sync(aside)
        os.replace(aside, file)
        sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """JSON, written atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(file, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
