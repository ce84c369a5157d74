"""One process at a time writes into a run's folder."""

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "lock.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder; the lock of a process that is dead is taken over, and that is said.

    Raises:
        ValueError: another process is writing into it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    content = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.time()})
    for _ in range(2):
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _take_over(folder, file)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(content)
        break
    else:
        raise ValueError(f"{folder} is being written by another process; wait for it, or give another output")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()


def _take_over(folder: Path, file: Path) -> None:
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        host, process, since = str(known["host"]), int(known["process"]), float(known["since"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError):
        host, process, since = socket.gethostname(), 0, 0.0  # it was killed while it wrote this
    if host != socket.gethostname() or _lives(process, since):
        raise ValueError(
            f"{folder} is being written by process {process} on {host} since {time.ctime(since)}; wait for it, give "
            f"another output, or remove {file} if there is no such process any more"
        )
    warnings.warn(f"{folder}: the process {process} that was writing here is gone; going on in its place", stacklevel=3)
    file.unlink(missing_ok=True)


def _lives(process: int, since: float) -> bool:
    import psutil

    try:
        return process > 0 and bool(psutil.Process(process).create_time() <= since)
    except psutil.Error:
        return False
