"""Time and memory by stage, and what a run ran on."""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sparsekit.system.install import OURS

PACKAGES = ("torch", "lightning", "transformers", "datasets", "lm-eval", "torchmetrics", "safetensors")


class Meter:
    """Seconds and peak resident memory by stage. Stages nest; what an inner one takes is not counted to the outer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}  # bytes
        self._stack: list[str] = []
        self._since = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count time and memory to `name` while this lasts."""
        self._switch(name)
        try:
            yield
        finally:
            self._switch(None)

    def stages(self) -> list[dict[str, Any]]:
        """[{name, seconds, peak_memory_bytes}] in the order of their first appearance."""
        return [
            {"name": name, "seconds": round(seconds, 3), "peak_memory_bytes": self.peak[name]}
            for name, seconds in self.seconds.items()
        ]

    def _switch(self, name: str | None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the work would be counted to whoever waits for it
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        if name is None:
            self._stack.pop()
        else:
            self._stack.append(name)
            self.seconds.setdefault(name, 0.0)
            self.peak[name] = max(self.peak.get(name, 0), resident_memory())
        self._since = now

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            stack = self._stack[-1:]
            if stack:
                self.peak[stack[0]] = max(self.peak.get(stack[0], 0), resident_memory())


def resident_memory() -> int:
    """Bytes of memory this process holds now; on a GPU machine plus what torch holds there."""
    import psutil

    on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return psutil.Process().memory_info().rss + on_device


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import psutil

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Python, the libraries that matter, and the packages of the plugins that were used."""
    found = {"python": platform.python_version()}
    for package in (OURS, *PACKAGES, *extra):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def human_size(count: float) -> str:
    """Bytes for people: '1.3 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
