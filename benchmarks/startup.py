"""How long a user waits for an answer that needs no model: whole processes, median of several.

python -m benchmarks.startup [--runs 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STRUCTURE = "model: x\npattern: 3:2\nstages: [wandaa]\nclibration: {}\n"
OPTION = 'model: x\npattern: "2:4"\nstages: [{sparsegpt: {dampning: 0.1}}]\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        structure, option = Path(name) / "structure.yaml", Path(name) / "option.yaml"
        structure.write_text(STRUCTURE)
        option.write_text(OPTION)
        cases = {
            "sparsekit --help": (["--help"], 0),
            "sparsekit methods": (["methods"], 0),
            "structural recipe errors": (["fit", "--recipe", str(structure)], 2),
            "option error": (["fit", "--recipe", str(option)], 2),
        }
        for what, (arguments, status) in cases.items():
            seconds = []
            for _ in range(given.runs + 1):  # the first fills the file cache
                start = time.perf_counter()
                done = subprocess.run([sys.executable, "-m", "sparsekit", *arguments], capture_output=True)
                seconds.append(time.perf_counter() - start)
                assert done.returncode == status, done.stderr
            counted = seconds[1:]
            print(f"{what}: median {statistics.median(counted):.2f} s ({min(counted):.2f}-{max(counted):.2f})")


if __name__ == "__main__":
    main()
