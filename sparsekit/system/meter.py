"""Time and memory by stage, and what a run ran on."""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsekit.system.install import OURS

PACKAGES = ("torch", "lightning", "transformers", "datasets", "lm-eval", "torchmetrics", "safetensors")


class Meter:
    """Seconds and peak memory by stage. Stages nest; what an inner one takes is not counted to the outer.

    peak: bytes that the process had in memory at most; device_peak: bytes that torch had on the accelerator at most,
        of accelerators that count it. Both are the system's and the device's own counters, set back where a stage
        begins; where the system has none (other than Linux), memory is looked at 50 times a second.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.device_peak: dict[str, int] = {}
        self._stack: list[str] = []
        self._since = 0.0
        self._counted = self._on_device = False  # by the system, by the device; known once it is entered
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        self._counted, self._on_device = _set_back_process(), _set_back_device()
        if not self._counted:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if not self._counted:
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
        """[{name, seconds, peak_memory_bytes, peak_device_bytes}] in the order of their first appearance.

        peak_device_bytes: only where an accelerator counts it
        """
        return [
            {"name": name, "seconds": round(seconds, 3), "peak_memory_bytes": self.peak[name]}
            | ({"peak_device_bytes": self.device_peak[name]} if name in self.device_peak else {})
            for name, seconds in self.seconds.items()
        ]

    def _switch(self, name: str | None) -> None:
        if self._on_device:
            torch.accelerator.synchronize()  # else the work would be counted to whoever waits for it
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
            self._note(self._stack[-1])
        if name is None:
            self._stack.pop()
        else:
            self._stack.append(name)
            self.seconds.setdefault(name, 0.0)
            self.peak.setdefault(name, 0)
        if self._counted:
            _set_back_process()
        if self._on_device:
            _set_back_device()
        self._since = now

    def _note(self, stage: str) -> None:
        self.peak[stage] = max(self.peak[stage], _process_peak() if self._counted else resident_memory())
        if self._on_device:
            self.device_peak[stage] = max(self.device_peak.get(stage, 0), torch.accelerator.max_memory_allocated())

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            stack = self._stack[-1:]
            if stack:
                self.peak[stack[0]] = max(self.peak[stack[0]], resident_memory())


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _set_back_process() -> bool:
    """Begin the system's counter of this process's peak anew, if it has one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _process_peak() > 0
    except (OSError, LookupError, ValueError):
        return False


def _process_peak() -> int:
    """Bytes that this process had in memory at most since the counter began."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _set_back_device() -> bool:
    """Begin the accelerator's own counter of its peak anew, if there is one that counts."""
    try:
        if not torch.accelerator.is_available():
            return False
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.max_memory_allocated() >= 0
    except (AttributeError, RuntimeError, NotImplementedError):  # an older torch, or a device that does not count
        return False


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import psutil

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": _accelerator(),
    }


def _accelerator() -> str | None:
    """What the accelerator is called."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


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
