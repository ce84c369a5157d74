"""A segmentation model by method and pattern: intersection over union of each object, differences object by object.

    python -m benchmarks.sam [--model tests/models/tiny-sam] [--seeds 0 1 2] [--points 70% 2:4+int4] [--methods ...]

Without --calibration and --iou: drawings of tests/models/drawings.py, 128 for each seed to calibrate on and 200 others
to measure on. A row that is in --results already is not run again; `--table` prints what is there. A standard error is
that of the mean over seeds of the objects' differences, taken object by object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import sparsekit
from benchmarks.show import show
from sparsekit.measure import Overlap

HERE = Path(__file__).parents[1] / "tests" / "models"
POINTS = ["50%", "60%", "70%", "80%", "90%", "2:4", "4:8", "2:4+int4", "50%+int3"]
METHODS = ["magnitude", "wanda", "sparsegpt", "lamp", "lamp as published"]
HELD_OUT, CALIBRATION = range(900_000, 900_200), 800_000  # seeds of drawings


def stages(method: str, bits: int) -> list[Any]:
    """A method's stages; bits: of one asymmetric grid for each output, as in the paper; 0: none."""
    grid = {"bits": bits, "group": "channel", "symmetric": False}
    if method == "lamp":
        return [{"lamp": {"quantize": grid} if bits else {}}]
    if method == "lamp as published":
        solver = {"sparsegpt": {"quantize": grid} if bits else {}}
        return [{"lamp": {"solver": solver, "after": False, "per_token": False, "channels": "alike"}}]
    if method == "sparsegpt":
        return [{"sparsegpt": {"quantize": grid} if bits else {}}]
    return [method, *([{"quantize": grid}] if bits else [])]


def objects(overlap: Overlap, model: Any, processor: Any) -> list[float]:
    """Intersection over union of each object."""
    return [float(each) for index in overlap.chosen for each in overlap.of_image(model, processor, index)]


def measured(given: argparse.Namespace, method: str, point: str, seed: int, overlap: Overlap) -> dict[str, Any]:
    """One row: prune, prove, measure from disk."""
    pattern, _, bits = point.partition("+int")
    with tempfile.TemporaryDirectory() as folder:
        result = sparsekit.fit(
            {
                "model": str(given.model),
                "pattern": pattern,
                "stages": stages(method, int(bits or 0)),
                "targets": given.targets,
                "calibration": {"source": "images", "path": given.calibration.format(seed=seed), "samples": 128}
                | {"seed": seed, "batch": given.batch},
                "output": f"{folder}/run",
                "seed": seed,
                "loggers": [],
            },
            quiet=True,
        )
        if result.verified is not True:
            raise SystemExit(f"{method} {point} {seed} did not verify: {result.verified}")
        return {
            "method": method,
            "point": point,
            "seed": seed,
            "iou": objects(overlap, *sparsekit.load(f"{folder}/run")),
        }


def table(rows: list[dict[str, Any]]) -> None:
    """Means over all objects and seeds, and how far each method is above the one before it."""
    found = {(row["method"], row["point"], row["seed"]): np.array(row["iou"]) for row in rows}
    dense = next(iter(each for (method, _, _), each in found.items() if method == "dense"))
    order = [method for method in METHODS if any(key[0] == method for key in found)]
    points = [point for point in POINTS if any(key[1] == point for key in found)]
    lines = []
    for method in order:
        line = [method]
        for point in points:
            own = [each for (name, at, _), each in sorted(found.items()) if (name, at) == (method, point)]
            line.append(f"{np.mean(own):.4f}" if own else "")
        lines.append(line)
    for below, above in (("magnitude", "wanda"), ("wanda", "sparsegpt"), ("sparsegpt", "lamp")):
        line = [f"{above} - {below}"]
        for point in points:
            seeds = [key[2] for key in sorted(found) if key[:2] == (above, point) and (below, *key[1:]) in found]
            apart = [found[above, point, seed] - found[below, point, seed] for seed in seeds]
            line.append(f"{np.mean(apart):+.4f} ± {error(np.mean(apart, 0)):.4f}" if apart else "")
        lines.append(line)
    count = len({key[2] for key in found if key[0] != "dense"})
    title = f"IoU, dense {dense.mean():.4f} ± {error(dense):.4f}; {len(dense)} objects, {count} seeds"
    show(["", *points], lines, title=title, markdown=True)


def error(values: Any) -> float:
    """One standard error of a mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sam", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE / "tiny-sam")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--points", nargs="+", default=POINTS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--targets", nargs="+", help="as a recipe's, such as attention mlp convolution; other --results"
    )
    parser.add_argument("--calibration", default="", help="folder of images; {seed} in it stands for the seed")
    parser.add_argument("--iou", default="", help="images with masks, as evaluate.iou has them")
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--results", type=Path, default=Path("sam.jsonl"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    known = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.is_file() else []
    if given.table:
        table(known)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not given.calibration:
            sys.path.insert(0, str(HERE))
            from drawings import write_drawings

            write_drawings(Path(folder) / "held-out", HELD_OUT)
            for seed in given.seeds:
                first = CALIBRATION + 1000 * seed
                write_drawings(Path(folder) / str(seed), range(first, first + 128))
            given.calibration, given.iou = f"{folder}/{{seed}}/images", f"{folder}/held-out"
        overlap = Overlap(given.iou)
        done = {(row["method"], row["point"], row["seed"]) for row in known}
        wanted = [(method, point, seed) for method in given.methods for seed in given.seeds for point in given.points]
        with given.results.open("a") as handle:
            if ("dense", "", 0) not in done:
                dense = objects(overlap, *sparsekit.load(str(given.model)))
                handle.write(json.dumps({"method": "dense", "point": "", "seed": 0, "iou": dense}) + "\n")
            for method, point, seed in wanted:
                if (method, point, seed) not in done:
                    row = measured(given, method, point, seed, overlap)
                    handle.write(json.dumps(row) + "\n")
                    handle.flush()
                    print(method, point, seed, f"{np.mean(row['iou']):.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
