"""What a run tells: time and memory by stage, report.json, the model card, the closing table."""

import math
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("sparsekit", "torch", "lightning", "transformers", "datasets", "lm-eval", "torchmetrics", "safetensors")


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
    for package in (*PACKAGES, *extra):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def size(count: float) -> str:
    """Bytes for people: '1.3 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def quality(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, dense, pruned) of everything that was evaluated, context length included."""
    evaluation = report["evaluation"]
    dense, pruned = evaluation.get("dense") or {}, evaluation.get("pruned") or {}
    rows = []
    for name, value in pruned.get("perplexity", {}).items():
        context = pruned["context"][name]
        before = dense.get("perplexity", {}).get(name)
        what = f"perplexity {name}, {context['windows']} x {context['length']} tokens"
        rows.append((what, "-" if before is None else f"{before:.2f}", f"{value:.2f}"))
    for name, metrics in pruned.get("tasks", {}).items():
        for metric in (key for key in metrics if key.startswith("acc") and not key.endswith("_stderr")):
            before = dense.get("tasks", {}).get(name, {}).get(metric)
            rows.append((f"{name} {metric}", "-" if before is None else f"{before:.3f}", f"{metrics[metric]:.3f}"))
    return rows


def aim(report: dict[str, Any]) -> str:
    """What was done to the model, for titles: "pruned to 2:4", "30.0% of its blocks removed"."""
    said = [f"pruned to {report['recipe']['pattern']}"] if report["sparsity"]["per_linear"] else []
    if "structure" in report:
        said.insert(0, f"{removed(report['structure']):.1%} of its blocks removed")
    return " and ".join(said) or "trained"


def removed(structure: dict[str, Any]) -> float:
    """The share of the source blocks' parameters that is gone, after all cuts, those of earlier runs included."""
    return structure.get("total", 1 - math.prod(1 - share for share in structure["removed"]))


def model_card(report: dict[str, Any], recipe: str, loading: str) -> str:
    """README.md of the pruned model: what was done to it, what it is worth, how to load it."""
    rows = quality(report)
    lines = [f"# {report['model']['name']}, {aim(report)}", ""]
    if "structure" in report:
        lines += [_structure(report["structure"]), ""]
    if report["sparsity"]["per_linear"]:
        lines += [
            f"{report['sparsity']['total']:.2%} of the weights in the linears of its blocks are zero "
            f"({report['sparsity']['zeros']:,} of {report['sparsity']['parameters']:,}). "
            "Embeddings, the head and whatever no stage trains are the source model's.",
            "",
            "Zeros change neither the file's size nor the speed of ordinary kernels: they pay only where the hardware "
            "or the runtime uses them.",
            "",
        ]
    if rows:
        lines += ["| quality | dense | pruned |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows), ""]
    verified = report["verified"]
    lines += ["Checked from disk: " + ("everything holds." if verified is True else "; ".join(verified)), ""]
    lines += ["## Load it", "", "```python", loading, "```", "", "## Recipe", "", "```yaml", recipe.strip()]
    lines += ["```", "", "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items())]
    return "\n".join(lines) + "\n"


def _structure(structure: dict[str, Any]) -> str:
    before, after = structure["parameters"]["dense"], structure["parameters"]["pruned"]
    kept = len(structure["layers"])
    return f"{after:,} of {before:,} parameters are left ({after / before:.1%}), in {kept} layers."


def closing_table(report: dict[str, Any], folder: str) -> Any:
    """The rich table that ends a run."""
    from rich.table import Table

    table = Table(title=f"{report['model']['name']}, {aim(report)}", title_justify="left")
    for column, justify in (("", "left"), ("dense", "right"), ("pruned", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in quality(report):
        table.add_row(*row)
    verified = report["verified"] is True
    proof = "proved from disk" if verified else "[bold red]NOT as asked[/]"
    if "structure" in report:
        parameters = report["structure"]["parameters"]
        table.add_row(f"parameters, {proof}", f"{parameters['dense']:,}", f"{parameters['pruned']:,}")
    if report["sparsity"]["per_linear"]:
        table.add_row(f"sparsity of the pruned linears, {proof}", "", f"{report['sparsity']['total']:.2%}")
    table.add_row("seconds, all stages", "", f"{sum(stage['seconds'] for stage in report['stages']):.0f}")
    peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
    table.add_row("peak memory of the process", "", size(peak))
    table.add_row("the result", "", folder)
    return table
