"""How much sooner a whole command ends with two processes than with one, each on a core of its own.

    python -m benchmarks.processes [--model smollm2-135m] [--samples 24] [--length 256] [--stages sparsegpt lamp ...]

Start-up, loading, hashing and the proof from disk are in it; evaluation is not, as the recipe has no `evaluate`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = {
    "sparsegpt": "pattern: '2:4'\nstages: [sparsegpt]",
    "lamp": "pattern: '2:4'\nstages: [{lamp: {epochs: 1}}]",
    "sparsellm": "pattern: 50%\nstages: [{sparsellm: {epochs: 1}}]",
    "policy_gradient": "stages: [{policy_gradient: {remove: 20%, steps: 12, masks: 4, batch: 2, length: 256}}]",
}


def seconds(rest: str, settings: argparse.Namespace, processes: int, folder: Path) -> float:
    """Of one whole command."""
    file = folder / f"{processes}.yaml"
    file.write_text(
        f"model: {settings.model}\n"
        f"calibration: {{source: python-docs, samples: {settings.samples}, length: {settings.length}}}\n"
        f"trainer: {{accelerator: cpu, devices: {processes}}}\noutput: {folder / str(processes)}\n{rest}\n"
    )
    command = [sys.executable, "-m", "sparsekit", "fit", "--recipe", str(file)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """One process and two, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    settings = parser.parse_args()
    for stage in settings.stages:
        with tempfile.TemporaryDirectory() as folder:
            one, two = (seconds(STAGES[stage], settings, count, Path(folder)) for count in (1, 2))
        print(f"{stage}: one process {one:.0f} s, two {two:.0f} s, {one / two:.2f} times", flush=True)


if __name__ == "__main__":
    main()
