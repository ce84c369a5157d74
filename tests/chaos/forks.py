"""Commands in children of one warm process, which may be killed, starved of disk, or take too long."""

import ctypes
import hashlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 30  # seconds that a command may take which only reads
LONG = 240  # and one that prunes


class Ended(NamedTuple):
    """How a command ended. status: its exit code, minus the signal that ended it; said: all that it printed"""

    status: int
    said: str

    @property
    def traceback(self) -> bool:
        """Whether a user would have seen one."""
        return "Traceback (most recent call last)" in self.said

    @property
    def hung(self) -> bool:
        """Whether it took longer than it may."""
        return self.status == -signal.SIGALRM


def forked(
    arguments: list[str], folder: Path, *, seconds: int = PATIENCE, before: Callable[[], None] | None = None
) -> Ended:
    """`sparsekit ARGUMENTS` in a child. before: called in the child first; folder: where it is and may write."""
    output = folder / f".said-{time.monotonic_ns()}"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background
            signal.alarm(seconds)
            os.chdir(folder)
            said = os.open(output, os.O_CREAT | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
            if before is not None:
                before()
            from sparsekit.cli import main

            status = main(arguments)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 70
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # a signal may come here too; what is above belongs to the parent
                os._exit(status)
    _, raw = os.waitpid(child, 0)
    text = output.read_text(errors="replace") if output.exists() else ""
    output.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(raw), text)


def watch(folder: Path, call: Callable[[], object]) -> None:
    """Call something before every operation on files in a folder: opening to write, writing in place, syncing,
    renaming, removing, making."""
    events = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")
    home, writing = str(folder), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & writing
        if (writes or event in events) and isinstance(given[0], str | os.PathLike) and str(given[0]).startswith(home):
            call()

    sys.addaudithook(hook)
    for name in ("pwrite", "fsync", "posix_fallocate"):  # which tell no audit hook of themselves
        setattr(os, name, _told(getattr(os, name), home, call))


def _told(real: Callable[..., Any], home: str, call: Callable[[], object]) -> Callable[..., Any]:
    """The same system call, that says so first; of bytes to be written, half are by then."""

    def told(handle: int, *given: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(home):
            if real.__name__ == "pwrite":
                real(handle, given[0][: len(given[0]) // 2], given[1])
            call()
        return real(handle, *given)

    return told


def at(count: int, inside: Path, do: Callable[[], object]) -> Callable[[], None]:
    """Does something at the `count`th operation on files inside a folder, once."""

    def arm() -> None:
        left = [count]

        def one() -> None:
            left[0] -= 1
            if not left[0]:
                do()

        watch(inside, one)

    return arm


def die(number: int = signal.SIGKILL) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def small_files(limit: int) -> Callable[[], None]:
    """No file may be larger than `limit` bytes: what a full disk looks like to the process."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return arm


class Disk:
    """A disk of its own for a folder, in memory, whose size is given. Raises OSError where nothing may be mounted."""

    def __init__(self, folder: Path):
        self.folder, self.system = folder, ctypes.CDLL(None, use_errno=True)
        folder.mkdir(exist_ok=True)

    def mount(self, size: int, flags: int = 0) -> None:
        """Mount it, or, with the flag REMOUNT, give it another size."""
        told = f"size={max(size, 4096)}".encode()
        if self.system.mount(b"none", str(self.folder).encode(), b"tmpfs", flags, told):
            raise OSError(ctypes.get_errno(), "cannot mount")

    def unmount(self) -> None:
        """Take it away, with all that is on it."""
        self.system.umount2(str(self.folder).encode(), 2)


REMOUNT, READ_ONLY = 32, 1  # flags of mount(2)


def bits(run: Path) -> str:
    """What a run's weights and masks are."""
    files = [*sorted((run / "model").glob("*.safetensors")), run / "masks.safetensors"]
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file())
