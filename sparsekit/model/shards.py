"""Weight files of a checkpoint that are laid out before their tensors are known, and written tensor by tensor in place.

The format is that of safetensors: eight bytes with the length of a header in JSON, the header, and the tensors' bytes
one after another (https://huggingface.co/docs/safetensors). Files and index have the names that transformers reads.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparsekit.model.checkpoint import INDEX
from sparsekit.system import sync

SHARD = "5GB"  # the largest file


class Place(NamedTuple):
    """Where a tensor's bytes are: the file, the first byte in it, and the number of bytes."""

    file: Path
    start: int
    size: int


class Shards:
    """The weight files in a folder: `write` puts tensors where they belong, `digest` reads what is there.

    places: a tensor's stored name -> where it is

    Raises:
        ValueError: the folder has no such files, or their headers are damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, Place] = {}
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no weight files")
        for file in files:
            self.places |= _places(file)

    @classmethod
    def lay_out(cls, folder: Path, tensors: Mapping[str, Tensor]) -> "Shards":
        """Make the files for tensors (which may be on the meta device: names, shapes and dtypes count); all bytes zero.

        The disk's room is taken here, so that a full disk is known before anything is computed.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        bare = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
        split = split_torch_state_dict_into_shards(bare, max_shard_size=SHARD)
        for name, names in split.filename_to_tensors.items():
            _make(folder / name, {each: bare[each] for each in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            sync(folder / INDEX)
        sync(folder)
        return cls(folder)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places and on the disk.

        Raises:
            ValueError: there is no such place, or it is of another size.
            OSError: the disk is full or the folder cannot be written.
        """
        handles: dict[Path, int] = {}
        try:
            for name, tensor in tensors.items():
                place, content = self.places.get(name), _bytes(tensor)
                if place is None or place.size != len(content):
                    raise ValueError(f"{self.folder} has no place for {name} {tuple(tensor.shape)} {tensor.dtype}")
                if place.file not in handles:
                    handles[place.file] = os.open(place.file, os.O_WRONLY)
                _write(handles[place.file], content, place.start)
            for handle in handles.values():
                os.fsync(handle)
        finally:
            for handle in handles.values():
                os.close(handle)

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 of what is on the disk under these names; that of `digest_of` where it is what was written.

        Raises:
            ValueError: there is no place of such a name.
        """
        found = hashlib.sha256()
        for name in sorted(names):
            place = self.places.get(name)
            if place is None:
                raise ValueError(f"{self.folder} has no place for {name}")
            found.update(name.encode())
            with place.file.open("rb") as handle:
                handle.seek(place.start)
                left = place.size
                while piece := handle.read(min(left, 1 << 24)):
                    found.update(piece)
                    left -= len(piece)
        return found.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _make(file: Path, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # so that each is aligned
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        size = 8 + len(text) + end
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        handle.truncate(size)
        handle.flush()
        os.fsync(handle.fileno())


def _places(file: Path) -> dict[str, Place]:
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        spans = {name: told["data_offsets"] for name, told in header.items()}
        return {name: Place(file, 8 + length + start, end - start) for name, (start, end) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has a damaged header: {error}") from error


@cache
def _code(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, asked of the library."""
    written = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    return str(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["x"]["dtype"])


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _write(handle: int, content: memoryview, start: int) -> None:
    while content:
        written = os.pwrite(handle, content[: 1 << 30], start)  # the system takes at most 2 GiB in one call
        content, start = content[written:], start + written
