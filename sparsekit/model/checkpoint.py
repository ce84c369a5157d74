"""A folder of safetensors that is read lazily, tensor by tensor."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Checkpoint:
    """A folder of safetensors: names and shapes from the headers, tensors one at a time.

    Raises:
        ValueError: the folder is no checkpoint, a shard is missing, or a file is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.folder} is no checkpoint: it has no config.json; give a folder that has one")
        self.files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            absent = sorted(shard for shard in shards if not (self.folder / shard).is_file())
            if absent:
                raise ValueError(f"{self.folder} is incomplete: its index names {absent[0]}, which is not there")
            self.files = sorted(self.folder / shard for shard in shards)
        if not self.files:
            raise ValueError(f"{self.folder} holds no safetensors; sparsekit reads weights from safetensors only")
        self.where: dict[str, Path] = {}
        for file in self.files:
            with _opened(file) as handle:
                self.where.update(dict.fromkeys(handle.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, read from disk now, on the CPU, in the dtype of the file."""
        with _opened(self.where[name]) as handle:
            return handle.get_tensor(name)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several at once, from one memory map of each file; with a map for each tensor, pages would count twice."""
        wanted = set(names)
        found: dict[str, Tensor] = {}
        for file in self.files:
            with _opened(file) as handle:
                found |= {name: handle.get_tensor(name) for name in wanted.intersection(handle.keys())}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        with _opened(self.where[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def key(self, name: str, prefix: str = "") -> str:
        """The name in the files of the parameter that the model calls `name`.

        Checkpoints of a bare model leave out the head model's `prefix` ("transformer.", "model.").
        """
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in self.where:
                return candidate
        raise ValueError(f"{self.folder} holds no tensor {name}; its layers must be stored under the model's own names")

    def names(self, prefix: str = "") -> set[str]:
        """What the model may call the tensors: as they are stored, and with or without its `prefix`; see `key`."""
        start = f"{prefix}."
        return {*self, *(start + name for name in self), *(name.removeprefix(start) for name in self)}

    def digest(self) -> str:
        """SHA-256 over all weight files: two checkpoints with the same digest hold the same bits."""
        return _digest(self.files)


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or truncated ({os.path.getsize(file):,} bytes: {error}); fetch or write it again"
        ) from error
