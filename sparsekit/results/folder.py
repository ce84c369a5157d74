"""The folder of a run: what it holds, and where."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sparsekit.model import Block, read_json

STATE = "run.json"  # the fingerprint of a run that has begun
MODEL = "model"  # the result: a checkpoint
WEIGHTS = "weights"  # of the model on its way to become model/
MASKS = "masks.safetensors"  # of pruned weights
REPORT = "report.json"  # written last: its presence means that the run is finished


def state_of(output: Path, segment: int) -> Path:
    """Where a run keeps what is finished of this number of `Plan.segments`: masks and records of blocks, and so on."""
    return output / "blocks" / str(segment) if segment else output / "blocks"


def weights_of(output: Path, segment: int) -> Path:
    """Where the weights are written, block by block, that this number of `Plan.segments` leaves."""
    return output / WEIGHTS / str(segment)


class Before:
    """The finished run that a recipe goes on from: the masks and records of its pruned linears."""

    def __init__(self, run: str | Path):
        report = read_json(Path(run) / REPORT)
        self.linears: dict[str, dict[str, Any]] = report["sparsity"]["per_linear"]
        self.errors: dict[str, float] = report["error"]
        self.file = Path(run) / MASKS

    def records(self, block: Block) -> dict[str, dict[str, Any]]:
        """As `Block.records` has them."""
        return {
            name: {**self.linears[name], "error": self.errors.get(name), "seconds": 0.0, "warnings": []}
            for name in block.linears
            if name in self.linears
        }

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A block's masks as packed bits, by the names of its linears; see `walk.Commits.masks`."""
        with safe_open(self.file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in block.linears}


def source_of(path: str | Path) -> dict[str, Any] | None:
    """The `model` of the recipe that a run's result was made with, told by its report; None for anything else."""
    for folder in (Path(path), Path(path).parent):
        if (folder / REPORT).is_file():
            model = (read_json(folder / REPORT).get("recipe") or {}).get("model")
            return model if isinstance(model, dict) and "path" in model else None
    return None


def clear_working_files(output: Path, keep: bool) -> None:
    """Remove what only an unfinished run needs."""
    for name in ("activations", WEIGHTS) if keep else ("activations", WEIGHTS, "blocks"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "hparams.yaml").unlink(missing_ok=True)
