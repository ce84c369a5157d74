"""The campaign: `python -m tests.chaos`. Counts may add up over several runs of it; the seed is part of the table."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

import torch

from tests.chaos import damages, recipes, runs
from tests.chaos.forks import forked


def warm(folder: Path) -> None:
    """Import what every child needs, once."""
    import lightning.pytorch  # noqa: F401
    import lm_eval.utils  # noqa: F401
    import transformers  # noqa: F401

    import sparsekit.run
    import sparsekit.run.sequence
    import sparsekit.stages.lora  # noqa: F401
    from sparsekit.system import begin_vector_maths

    torch.set_num_threads(1)
    begin_vector_maths()
    forked(["--version"], folder)


def main() -> int:
    """Run the campaigns that were asked for and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    for name, count in (("recipes", 200), ("damages", 100), ("kills", 45), ("disks", 27)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"default {count}")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sparsekit-chaos-"))
    wrong: list[str] = []
    print("| campaign | seed | tried | what came of it | wrong | seconds |\n|---|---|---|---|---|---|")

    def tell(name: str, count: int, started: float, found: tuple) -> None:
        seen, bad = found
        wrong.extend(f"{name}: {each}" for each in bad)
        told = ", ".join(f"{number} {what}" for what, number in sorted(seen.items()) if what != "wrong")
        print(f"| {name} | {given.seed} | {count} | {told} | {len(bad)} | {time.time() - started:.0f} |", flush=True)

    try:
        warm(folder)
        if given.recipes:
            started = time.time()
            tell("recipes", given.recipes, started, recipes.campaign(given.recipes, given.seed, folder))
        kinds = [runs.Kind(name, folder) for name in runs.KINDS] if given.damages or given.kills or given.disks else []
        for kind in kinds:
            shutil.copytree(kind.run, kind.folder / "whole")
        if given.damages:
            started = time.time()
            tell("damages", given.damages, started, damages.campaign(given.damages, given.seed, kinds))
        for name, campaign in (("kills", runs.kills), ("disks", runs.disks)):
            if count := getattr(given, name):
                started = time.time()
                tell(name, count, started, campaign(count, given.seed, kinds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for each in wrong:
        print(f"\n{each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
