"""Files that are there whole or not at all, and bits packed into bytes."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Booleans of any shape as bits, eight to a byte."""
    return torch.from_numpy(numpy.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The booleans that `pack` was given, in their shape."""
    count = int(numpy.prod(shape))
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=count)).bool().view(shape)


def count_bits(bits: Tensor) -> int:
    """How many of the booleans that `pack` was given are true."""
    return int(numpy.bitwise_count(bits.numpy()).sum())


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file of safetensors, readable as the user's umask says; raises OSError where the disk is full."""
    with disk_errors(file):
        save_file(tensors, file, metadata=metadata)
    make_readable(file)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Writers in Rust report a full disk in types of their own: make it the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    except Exception as error:  # that of the tokenizers library has no narrower type
        if not isinstance(error, OSError) and (number := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(number[1]), f"cannot write {path}: {error}") from error
        raise


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
