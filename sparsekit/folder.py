"""The folder of a run: what may write into it, what it remembers, and when it is finished."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsekit import checkpoint, report
from sparsekit.blocks import Block
from sparsekit.commits import Commits, unpack, write_json
from sparsekit.plan import Plan
from sparsekit.recipe import kind

STATE = "run.json"  # the fingerprint of a run that has begun
MASKS = "masks.safetensors"  # of pruned weights
REPORT = "report.json"  # written last: its presence means that the run is finished
# keys of a recipe that do not change the weights, so that a resumed run may change them
FREE = ("output", "memory", "evaluate", "keep", "loggers")


def check(output: Path, resume: bool) -> None:
    """Refuse a folder that this run may not write into.

    Raises:
        ValueError: it holds another run, or something that is no run.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; give a folder that does not exist yet")
    if not output.is_dir() or not any(output.iterdir()) or (resume and (output / STATE).is_file()):
        return
    if (output / REPORT).is_file():
        raise ValueError(f"{output} holds a finished run; give another output (--set output=...) or remove the folder")
    if (output / STATE).is_file():
        done = len(Commits(output / "blocks").done())
        raise ValueError(
            f"{output} holds an unfinished run with {done} committed blocks; "
            "continue it with --resume, or give another output (--set output=...)"
        )
    raise ValueError(f"{output} is not empty and holds no run of sparsekit; give a folder that does not exist yet")


def begin(output: Path, fingerprint: dict[str, Any]) -> bool:
    """Claim the output folder, or check that the run in it is this one. True: it is finished already.

    Raises:
        ValueError: the run in the folder differs; the differences are named.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / STATE).is_file():
            write_json(output / STATE, fingerprint)
            return False
    except OSError as error:
        raise OSError(f"cannot write into {output}: {error.strerror or error}; nothing was done") from error
    known = json.loads((output / STATE).read_text(encoding="utf-8"))
    differences = list(_differences(known, json.loads(json.dumps(fingerprint))))
    if differences:
        raise ValueError(
            f"{output} holds a run that cannot be resumed with this: {'; '.join(differences)}. "
            "Restore that, or give another output (--set output=...)"
        )
    return (output / REPORT).is_file()


def fingerprint_of(planned: Plan, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the bits of the result."""
    decisive = {key: value for key, value in planned.resolved.items() if key not in FREE}
    walks = all(kind(stage) == "solver" for stage in planned.recipe.stages)
    if walks and planned.recipe.error_correction == "block":  # a block is the same in whatever process it is pruned
        free = ("devices", "num_nodes")
        decisive["trainer"] = {key: value for key, value in decisive["trainer"].items() if key not in free}
    return {
        "recipe": decisive,
        "data": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "model": checkpoint.Checkpoint(planned.folder).digest(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version
            for name, version in report.versions(planned.packages()).items()
            if name in ("torch", "transformers", "sparsekit", *planned.packages())
        },
    }


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif old != new:
        if where == "data":
            yield "the calibration text gives other tokens"
        elif where == "model":
            yield "the source model's weights are others"
        else:
            yield f"{where} was {json.dumps(old)}, is {json.dumps(new)}"


def once(file: Path, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement that a resumed run need not repeat, unless it is asked for something else."""
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known["values"]
    values = measure()
    write_json(file, {"settings": settings, "values": values})
    return values


def commits(output: Path, segment: int) -> Commits:
    """Where the blocks are committed that are finished with this number of `Plan.segments`."""
    return Commits(output / "blocks" / str(segment) if segment else output / "blocks")


class Before:
    """The finished run that a recipe goes on from: the masks and records of its pruned linears."""

    def __init__(self, run: str | Path):
        report = json.loads((Path(run) / REPORT).read_text(encoding="utf-8"))
        self.linears: dict[str, dict[str, Any]] = report["sparsity"]["per_linear"]
        self.errors: dict[str, float] = report["error"]
        self.file = Path(run) / MASKS

    def records(self, block: Block) -> dict[str, dict[str, Any]]:
        """As `Block.records` has them."""
        return {
            name: {**self.linears[name], "error": self.errors[name], "seconds": 0.0, "warnings": []}
            for name in block.linears
            if name in self.linears
        }

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A block's masks as packed bits, by the names of its linears; see `Commits.masks`."""
        with safe_open(self.file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in block.linears}


def masks(output: Path, planned: Plan) -> dict[str, Tensor]:
    """The stored masks, read back from disk."""
    from safetensors.torch import load_file

    bits = load_file(output / MASKS)
    return {
        name: unpack(bits[name], linear.shape) for block in planned.blocks for name, linear in block.linears.items()
    }


def source_of(path: str | Path) -> dict[str, Any] | None:
    """The `model` of the recipe that a run's result was made with, told by its report; None for anything else."""
    for folder in (Path(path), Path(path).parent):
        if (folder / REPORT).is_file():
            return json.loads((folder / REPORT).read_text(encoding="utf-8"))["recipe"]["model"]
    return None


def clear(output: Path, keep: bool) -> None:
    """Remove what only an unfinished run needs."""
    for name in ("activations",) if keep else ("activations", "blocks"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "hparams.yaml").unlink(missing_ok=True)
