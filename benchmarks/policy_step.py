"""What a step of policy_gradient costs over the bare forward passes in it: time and peak memory on a real model.

    python -m benchmarks.policy_step [--model smollm2-135m] [--masks 4] [--batch 2] [--length 128] [--steps 5]

Heads and channels of all blocks, a random start, random tokens. Times: after each step as many bare passes over the
same tokens, so that both see the same machine; the ratio is that of the medians. Memory: each in a process of its own,
the peak of resident memory with the model in it, and over the loaded model.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.show import show
from sparsekit.measure import losses
from sparsekit.model import discover, load_plain, locate
from sparsekit.model.structure import find_units
from sparsekit.system import session
from sparsekit.train import PolicyGradient

COLUMNS = ["", "seconds", "ratio", "peak memory", "ratio", "over the model", "ratio"]


class Turns(Callback):
    """Times every step, and after it, unless alone, the bare passes."""

    def __init__(self, passes: int, alone: bool):
        self.passes, self.alone = passes, alone
        self.steps: list[float] = []
        self.bare: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self.began)
        if not self.alone:
            began = time.perf_counter()
            for _ in range(self.passes):
                losses(module.outside[0], module.text[: module.batch], batch=module.batch)
            self.bare.append(time.perf_counter() - began)


def run(given: argparse.Namespace) -> tuple[list[float], list[float], int, int]:
    """Seconds of every step and of its bare passes, peak memory and that of the loaded model in bytes."""
    with session():
        model, _ = load_plain(locate(given.model), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    text = torch.randint(0, vocabulary, (8 * given.batch, given.length), generator=generator)
    blocks = discover(model, text[:1, :8])
    loaded = psutil.Process().memory_info().rss
    turns = Turns(given.masks, alone=given.alone is not None)
    if given.alone == "bare":
        for _ in range(given.masks * given.steps):
            losses(model, text[: given.batch], batch=given.batch)
    else:
        module = PolicyGradient(
            model,
            blocks,
            find_units(model, blocks, ["heads", "channels"]),
            text,
            text[:0],
            score=None,
            remove=0.3,
            steps=given.steps + 1,
            masks=given.masks,
            batch=given.batch,
            learning_rate=0.05,
            say=lambda _: None,
        )
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[turns],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(range(given.steps + 1)))  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return turns.steps[1:], turns.bare[1:], peak, loaded  # the first has the libraries' own start in it


def _apart(kind: str, argv: Sequence[str]) -> tuple[int, int]:
    command = [sys.executable, "-m", "benchmarks.policy_step", *argv, "--alone", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, loaded = json.loads(done.stdout.splitlines()[-1])
    return peak, loaded


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("benchmarks.policy_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="whatever a recipe's `model` could name")
    for name, number in {"masks": 4, "batch": 2, "length": 128, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--alone", choices=["bare", "step"], help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(argv)
    if given.alone:
        print(json.dumps(run(given)[2:]))
        return
    peaks = {kind: _apart(kind, argv) for kind in ("bare", "step")}
    steps, bare, _, _ = run(given)
    seconds = {"bare": median(bare), "step": median(steps)}
    over = {kind: peak - loaded for kind, (peak, loaded) in peaks.items()}
    rows = [
        [
            {"bare": f"{given.masks} bare passes", "step": f"a step of {given.masks} masks"}[kind],
            f"{seconds[kind]:.2f}",
            f"{seconds[kind] / seconds['bare']:.3f}",
            f"{peaks[kind][0] / 2**20:.0f} MiB",
            f"{peaks[kind][0] / peaks['bare'][0]:.3f}",
            f"{over[kind] / 2**20:.0f} MiB",
            f"{over[kind] / over['bare']:.2f}",
        ]
        for kind in ("bare", "step")
    ]
    show(COLUMNS, rows, markdown=given.markdown)


if __name__ == "__main__":
    main()
