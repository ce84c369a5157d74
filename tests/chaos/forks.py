"""Commands in children of one warm process, which may be killed, starved of disk, or take too long."""

import hashlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, raw = os.waitpid(child, 0)
    text = output.read_text(errors="replace") if output.exists() else ""
    output.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(raw), text)


def watch(folder: Path, call: Callable[[], object]) -> None:
    """Call something before every operation on files in a folder: opening to write, renaming, removing, making."""
    events = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")
    home, writing = str(folder), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & writing
        if (writes or event in events) and isinstance(given[0], str | os.PathLike) and str(given[0]).startswith(home):
            call()

    sys.addaudithook(hook)


def die_at(count: int, inside: Path) -> Callable[[], None]:
    """Kills the process at so many operations on files inside a folder."""

    def arm() -> None:
        left = [count]

        def one() -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(inside, one)

    return arm


def small_disk(limit: int) -> Callable[[], None]:
    """No file may be larger than `limit` bytes: what a full disk looks like to the process."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return arm


def bits(run: Path) -> str:
    """What a run's weights and masks are."""
    files = [*sorted((run / "model").glob("*.safetensors")), run / "masks.safetensors"]
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file())
