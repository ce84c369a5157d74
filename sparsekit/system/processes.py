"""Several processes: who is who, and how what one does alone is kept apart."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# how torchrun and Lightning tell a process who it is; libraries that read these would wait for the other processes
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


def process_rank() -> int:
    """The number of this process among those that run the same recipe; 0 leads."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0) or 0)


def divide_threads(devices: int | str | list[int]) -> None:
    """Share out the cores to the processes that are going to be started, unless the user has done so."""
    count = len(devices) if isinstance(devices, list) else devices
    if not isinstance(count, int) or count < 2 or "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, torch.get_num_threads() // count)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the others


def die_with_parent() -> None:
    """Have the system end this process with the one that started it, even if that is killed (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def meet() -> None:
    """Wait until all processes of the group are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_group() -> None:
    """End the group of processes; from here on this one works alone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in VARIABLES:
        os.environ.pop(name, None)


@contextmanager
def alone() -> Iterator[None]:
    """While this lasts, libraries that look for other processes (accelerate) find none."""
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
