"""Files that a run goes on from: whole, synced, and with their SHA-256 beside them, so that a damaged one is seen."""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekit.system.files import sync, write_atomically

BESIDE = ".sha256"


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def commit(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(path)` make a file aside; then its digest is beside it, and last it gets its name.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing was committed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write(aside)
        sync(aside)
        told = digest_of(aside)
        write_atomically(_beside(file), lambda path: path.write_text(told + "\n", encoding="ascii"))
        os.replace(aside, file)
        sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def committed(file: Path) -> bool:
    """Whether a file was committed and is what it was then. One that is not is named in a warning, and not used."""
    if not file.is_file():
        return False
    try:
        told = _beside(file).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        told = ""
    if told == digest_of(file):
        return True
    why = "is not what was committed" if told else "has no digest beside it"
    warnings.warn(f"{file} {why}; it is made again", stacklevel=2)
    return False


def forget(file: Path) -> None:
    """Remove a committed file."""
    file.unlink(missing_ok=True)
    _beside(file).unlink(missing_ok=True)


def _beside(file: Path) -> Path:
    return file.with_name(file.name + BESIDE)
