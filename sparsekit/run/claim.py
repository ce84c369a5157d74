"""Who may write into a run's folder, and what a resumed run must have in common with the one that was left."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.model import read_json
from sparsekit.recipe import kind
from sparsekit.results import REPORT, STATE, source_digests
from sparsekit.run.lock import LOCK
from sparsekit.run.plan import Plan
from sparsekit.system import OURS, commit, committed, versions, write_json
from sparsekit.walk import count_committed

# keys of a recipe that do not change the weights, so that a resumed run may change them
FREE = ("output", "memory", "evaluate", "keep", "loggers")
MACHINE = ("threads", "device", "precision", "versions")  # parts of a fingerprint that say what a run ran on


def check_output(output: Path, resume: bool) -> None:
    """Refuse a folder that this run may not write into.

    Raises:
        ValueError: it holds another run, or something that is no run.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {output} is a file; give a folder that does not exist yet")
    if not output.is_dir() or all(_ours(file) for file in output.iterdir()) or (resume and (output / STATE).is_file()):
        return
    if (output / REPORT).is_file():
        raise ValueError(f"{output} holds a finished run; give another output (--set output=...) or remove the folder")
    if (output / STATE).is_file():
        done = count_committed(output / "blocks")
        raise ValueError(
            f"{output} holds an unfinished run with {done} committed blocks; "
            "continue it with --resume, or give another output (--set output=...)"
        )
    raise ValueError(f"{output} is not empty and holds no run of sparsekit; give a folder that does not exist yet")


def _ours(file: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it had begun."""
    return file.name == LOCK or (file.name.startswith(".") and file.name.endswith(".part"))


def claim_output(output: Path, fingerprint: dict[str, Any]) -> bool:
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
    known, now = read_json(output / STATE), json.loads(json.dumps(fingerprint))
    finished = (output / REPORT).is_file()
    if finished:  # nothing will be computed, so it does not matter where
        known, now = ({key: value for key, value in each.items() if key not in MACHINE} for each in (known, now))
    differences = list(_differences(known, now))
    if differences:
        raise ValueError(
            f"{output} holds a run that cannot be resumed with this: {'; '.join(differences)}. "
            "Restore that, or give another output (--set output=...)"
        )
    return finished


def fingerprint_of(planned: Plan, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the bits of the result."""
    decisive = {key: value for key, value in planned.resolved.items() if key not in FREE}
    decisive["trainer"] = {key: value for key, value in decisive["trainer"].items() if key != "logger"}
    walks = all(kind(stage) == "solver" for stage in planned.recipe.stages)
    if walks and planned.recipe.error_correction == "block":  # a block is the same in whatever process it is pruned
        free = ("devices", "num_nodes")
        decisive["trainer"] = {key: value for key, value in decisive["trainer"].items() if key not in free}
    return {
        "recipe": decisive,
        "data": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "model": planned.source.digest(),
        **({"source": source_digests(planned.folder)} if planned.folder.is_dir() else {}),
        "threads": torch.get_num_threads(),
        "device": planned.device.type,
        "precision": {
            "float32_matmul": torch.get_float32_matmul_precision(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        },
        "versions": {
            name: version
            for name, version in versions(planned.packages()).items()
            if name in ("torch", "transformers", OURS, *planned.packages())
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
        elif where.startswith("source."):
            yield f"the source model's {where.removeprefix('source.')} is another"
        else:
            yield f"{where} was {json.dumps(old)}, is {json.dumps(new)}"


def measured_once(file: Path, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement that a resumed run need not repeat, unless it is asked for something else."""
    if committed(file):
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known["values"]
    values = measure()
    text = json.dumps({"settings": settings, "values": values}, indent=1, ensure_ascii=False)
    commit(file, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
    return values
