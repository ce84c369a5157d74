"""report.json of a run, read and checked: what readers may rely on, of every version."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsekit.model import read_json
from sparsekit.results.folder import REPORT


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Part):
    name: str


class _Measured(_Part):
    perplexity: dict[str, float] = {}
    perplexity_stderr: dict[str, float] = {}
    context: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, float]] = {}
    figures: dict[str, dict[str, Any]] = {}


class _Stage(_Part):
    name: str
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int | None = None


class _Sparsity(_Part):
    total: float
    per_linear: dict[str, dict[str, Any]]


class _Counts(_Part):
    dense: int
    pruned: int


class _Structure(_Part):
    parameters: _Counts | None = None


class _Recipe(_Part):
    stages: list[dict[str, Any] | str] = []


class _Report(_Part):
    """Whatever is there must be of its kind; what is absent, earlier versions did not write."""

    model: _Model | None = None
    recipe: _Recipe | None = None
    stages: list[_Stage] = []
    sparsity: _Sparsity | None = None
    evaluation: dict[str, _Measured] | None = None
    verified: Literal[True] | list[str] = True
    error: dict[str, float] = {}
    structure: _Structure | None = None
    exports: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    warnings: dict[str, list[str]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    notes: dict[str, Any] = {}
    samples: list[dict[str, str]] = []
    fingerprint: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}


def read_report(run: str | Path, *needs: str) -> dict[str, Any]:
    """What report.json of a run says. needs: keys that must be there

    Raises:
        ValueError: it is not there, or is not what a run leaves.
    """
    file = Path(run) / REPORT
    content = read_json(file, f"{run} has no {REPORT}")
    try:
        _Report.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} is not what a run leaves ({where}: {first['msg']}); restore it") from error
    if absent := [key for key in needs if key not in content]:
        raise ValueError(f"{file} is not what a run leaves (it has no {absent[0]}); restore it")
    return content
