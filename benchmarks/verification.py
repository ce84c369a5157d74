"""Time and memory of `verify`, beside reading and hashing the same files once.

    python -m benchmarks.verification [--width 2048] [--blocks 9] [--rounds 3]

A random LLaMA in bfloat16 (about 1 GB by default) is pruned 2:4 by magnitude, and `verify RUN --against SOURCE` is run
in processes of their own, alternating with processes that read and hash the weight files of both sides one after
another. Python's start and imports are left out. Memory is anonymous (RssAnon), sampled every 5 ms, beyond what the
process has once everything is imported; allowed are four times the largest tensor and 200 MB.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.memory import build
from sparsekit.model import Checkpoint

TOKENIZER = Path(__file__).parents[1] / "tests" / "models" / "tiny-llama"
RECIPE = """\
model: {source}
pattern: "2:4"
calibration: {{source: python-docs, samples: 2, length: 16}}
stages: [magnitude]
evaluate: {{samples: false}}
output: {output}
"""


def hashed(run: Path, source: Path) -> None:
    """Read and hash the weights of both sides, one after another."""
    for folder in (source, run / "model"):
        Checkpoint(folder).digest()


def verified(run: Path, source: Path) -> None:
    """`verify RUN --against SOURCE`."""
    from sparsekit.results import verify_run

    found = verify_run(run, against=source)
    if found.failures:
        raise RuntimeError(found.failures[0])


def measured(work: Callable[[Path, Path], None], run: Path, source: Path, back: Any) -> None:
    """Seconds of some work, and the bytes of anonymous memory that it took, in this process."""
    from sparsekit.model import skeleton
    from sparsekit.results import verify_run

    skeleton(TOKENIZER)  # imports what building a model needs
    assert verify_run is not None  # and what a proof does
    peak, done = [0], threading.Event()
    start = _anonymous()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous() - start)

    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    work(run, source)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    back.put((seconds, peak[0]))


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def main() -> None:
    """Build, prune, measure, print."""
    from sparsekit.recipe import load_recipe
    from sparsekit.run import run_recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as home:
        source, output = Path(home) / "source", Path(home) / "run"
        build(source, given.width, given.blocks, vocabulary=32000, dtype=torch.bfloat16)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, source / name)
        largest = max(2 * math.prod(shape) for shape in Checkpoint(source).shapes.values())
        recipe = Path(home) / "recipe.yaml"
        recipe.write_text(RECIPE.format(source=source, output=output))
        run_recipe(load_recipe(recipe), console=Console(quiet=True))
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        found: dict[str, list[tuple[float, int]]] = {"hashed": [], "verified": []}
        for _ in range(given.rounds):
            for work in (hashed, verified):
                back = spawn.Queue()
                process = spawn.Process(target=measured, args=(work, output, source, back))
                process.start()
                found[work.__name__].append(back.get())
                process.join()
    seconds = {name: statistics.median(time for time, _ in each) for name, each in found.items()}
    memory = max(peak for _, peak in found["verified"])
    allowed = 4 * largest + 200 * 10**6
    print(f"{size / 1e9:.2f} GB on each side; hashed {seconds['hashed']:.2f} s, verified {seconds['verified']:.2f} s")
    print(f"ratio {seconds['verified'] / seconds['hashed']:.2f} (at most 1.5)")
    print(f"anonymous memory {memory / 1e6:.0f} MB (at most {allowed / 1e6:.0f})")


if __name__ == "__main__":
    main()
