"""Activations between two blocks: chunks on the accelerator or in CPU memory up to byte budgets, else in files."""

import ctypes
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
KEPT = 2**30  # bytes of freed memory that the C library may keep between two calls of `give_back`
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class _OnDisk:
    file: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        # mapped, copied, unmapped: what stays resident is one chunk, not the file
        mapped = torch.from_file(str(self.file), shared=False, size=math.prod(self.shape), dtype=self.dtype)
        return mapped.view(self.shape).clone()


def room_on(device: torch.device) -> int:
    """Bytes of an accelerator that activations may take: half of what is free; none where it cannot be asked."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type != "cpu" else None
    return 0 if ask is None else ask(device)[0] // 2


def give_back() -> None:
    """Have the C library return freed memory to the system, where it can: glibc keeps it otherwise, block after block.

    It costs milliseconds, and what a walk holds is then what it needs.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


@contextmanager
def tight() -> Iterator[None]:
    """While this lasts, memory of a megabyte or more goes back to the system as soon as it is freed (glibc only).

    For solvers, whose few large matrices would leave holes; a forward pass is faster without.
    """
    if not hasattr(_LIBC, "mallopt"):
        yield
        return
    _LIBC.malloc_trim(0)
    _LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        _LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)  # as far as glibc itself raises it
        _LIBC.mallopt(M_TRIM_THRESHOLD, KEPT)  # which it would raise as well, had nobody set the other
        _LIBC.malloc_trim(0)


_NUMBERS = itertools.count()


class ActivationStore:
    """An ordered list of chunks, each a tensor (sequences, length, hidden) or any other shape.

    What comes out knows where it was: its `place` is (this store's `number`, the chunk's index).

    room: bytes that may stay on the accelerator that computed them; none unless somebody says so
    budget: bytes kept in CPU memory; chunks that would exceed it go to files under `folder`, are read through a memory
    map and prefetched by a thread while the chunk before is in use. What comes out is bit for bit what went in.
    folder: where the files lie, made when first needed; None means the system's temporary folder.

    Writing is plain file output, never a write through the map: a full disk raises OSError instead of killing us.
    """

    def __init__(self, budget: int, folder: str | Path | None = None):
        self.budget, self.room = budget, 0
        self.number = next(_NUMBERS)
        self.resident = self.placed = 0  # bytes of the chunks in CPU memory, and on an accelerator
        self.parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._chunks: list[Tensor | _OnDisk] = []

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def rows(self) -> int:
        """The rows of all chunks: tokens."""
        return sum(math.prod(chunk.shape[:-1]) for chunk in self._chunks)

    def append(self, chunk: Tensor) -> None:
        """Add a chunk at the end."""
        self._chunks.append(self._place(chunk, len(self._chunks)))

    def __setitem__(self, index: int, chunk: Tensor) -> None:
        old = self._chunks[index]
        if isinstance(old, Tensor) and old.device.type == "cpu":
            self.resident -= old.nbytes
        elif isinstance(old, Tensor):
            self.placed -= old.nbytes
        self._chunks[index] = self._place(chunk, index)

    def __getitem__(self, index: int) -> Tensor:
        chunk = self._chunks[index]
        found = chunk if isinstance(chunk, Tensor) else chunk.read()
        found.place = (self.number, index)  # type: ignore[attr-defined]
        return found

    def __iter__(self) -> Iterator[Tensor]:
        """The chunks in order, wherever they are; the next one is read while the caller works on this one."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.__getitem__, 0) if len(self) else None
            for index in range(len(self)):
                assert ahead is not None
                chunk = ahead.result()
                if index + 1 < len(self):
                    ahead = reader.submit(self.__getitem__, index + 1)
                yield chunk

    def close(self) -> None:
        """Forget all chunks and remove the files."""
        self._chunks.clear()
        self.resident = self.placed = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _place(self, chunk: Tensor, index: int) -> Tensor | _OnDisk:
        chunk = chunk.detach().contiguous()
        if chunk.device.type != "cpu" and self.placed + chunk.nbytes <= self.room:
            self.placed += chunk.nbytes
            return chunk
        chunk = chunk.to("cpu")
        if self.resident + chunk.nbytes <= self.budget:
            self.resident += chunk.nbytes
            return chunk
        if self._folder is None:
            if self.parent is not None:
                Path(self.parent).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=self.parent, prefix="activations-")
        file = Path(self._folder.name) / f"{index:06d}.bin"
        with file.open("wb") as handle:
            chunk.view(-1).view(torch.uint8).numpy().tofile(handle)
        return _OnDisk(file, chunk.shape, chunk.dtype)
