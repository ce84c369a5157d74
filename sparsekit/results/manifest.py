"""The manifest of a run: what it left, file by file, bound together by one digest."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekit.model import Checkpoint, read_json
from sparsekit.system import digest_of, write_json

MANIFEST = "manifest.json"
FORMAT = 2  # of recipes' reports and manifests; 1 had no manifest
CARD = "README.md"
RESULT = ("masks.safetensors", "recipe.yaml")  # beside model/, what the run stands for
TOLD = ("report.json", "report.html", f"model/{CARD}")  # what tells of it, and is rewritten later by bench and export


def write_manifest(run: Path, source: Path | None, claims: dict[str, Any], versions: dict[str, str]) -> str:
    """Write manifest.json of a run whose model, masks and recipe are on disk; its digest.

    source: the checkpoint that the run began with; None: a model in memory
    claims: what the run says that the result is: patterns by linear, tensors that were changed, the grid; JSON
    """
    made = {
        "format": FORMAT,
        "files": {name: digest_of(run / name) for name in _result(run)},
        "source": {"weights": Checkpoint(source).digest(), **source_digests(source)} if source is not None else {},
        "claims": claims,
        "versions": versions,
    }
    digest = _bound(made)
    write_json(run / MANIFEST, {"digest": digest, **made, "told": {}})
    return digest


def seal(run: Path) -> None:
    """Put the files that tell of the result into the manifest; called by whoever rewrites one. Nothing without one."""
    if not (run / MANIFEST).is_file():
        return
    content = read_json(run / MANIFEST)
    told = {name: digest_of(run / name) for name in _told(run)}
    write_json(
        run / MANIFEST, content | {"told": told, "seal": _bound({"digest": content.get("digest"), "told": told})}
    )


def read_manifest(run: Path) -> dict[str, Any] | None:
    """What manifest.json says; None where there is none, as in runs of format 1 and in other people's folders.

    Raises:
        ValueError: it cannot be read, or is of a later format.
    """
    if not (run / MANIFEST).is_file():
        return None
    content = read_json(run / MANIFEST)
    number = content.get("format")
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(f"{run / MANIFEST} has format {number!r}, and this version reads up to {FORMAT}: update it")
    return content


def binding_failures(content: dict[str, Any]) -> list[str]:
    """Where a manifest does not fit its own digest, as sentences; no other file is read."""
    failures = []
    bound = {key: content.get(key) for key in ("format", "files", "source", "claims", "versions")}
    if content.get("digest") != _bound(bound):
        failures.append(f"{MANIFEST} does not have the digest that it says: it was changed")
    if not isinstance(content.get("files"), dict) or not isinstance(content.get("claims"), dict):
        failures.append(f"{MANIFEST} does not list files and claims")
    return failures


def manifest_failures(run: Path, content: dict[str, Any], *, told: bool = True) -> list[str]:
    """Where a run's folder is not what its manifest says, as sentences.

    told: look at report, page, card and exports too
    """
    if failures := binding_failures(content):
        return failures
    failures += _compared(run, content["files"], _result(run))
    if told:
        listed = content.get("told") or {}
        if content.get("seal") != _bound({"digest": content.get("digest"), "told": listed}):
            failures.append(f"the list of what tells of the result, in {MANIFEST}, was changed")
        failures += _compared(run, listed, _told(run))
        report = run / "report.json"
        if report.is_file() and read_json(report).get("manifest") != content.get("digest"):
            failures.append("report.json names another manifest")
    return failures


def source_failures(content: dict[str, Any], source: Path) -> list[str]:
    """Where a checkpoint is not the source that a manifest names, as sentences."""
    known, found = content.get("source") or {}, {"weights": Checkpoint(source).digest(), **source_digests(source)}
    return [
        f"{source} is not what the run began with: its {what} {'are' if what == 'weights' else 'is'} another"
        for what in known
        if known[what] != found.get(what)
    ]


def source_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what lies beside a source's weights: config, tokenizer, generation config."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    return {Path(name).stem: digest_of(folder / name) for name in names if (folder / name).is_file()}


def _result(run: Path) -> list[str]:
    inside = (str(file.relative_to(run)) for file in (run / "model").rglob("*") if file.is_file())
    return sorted(
        [*(name for name in inside if name not in TOLD), *(name for name in RESULT if (run / name).is_file())]
    )


def _told(run: Path) -> list[str]:
    exported = (file for folder in run.glob("model-*") for file in folder.rglob("*") if file.is_file())
    return sorted([*(name for name in TOLD if (run / name).is_file()), *(str(f.relative_to(run)) for f in exported)])


def _compared(run: Path, listed: dict[str, str], there: list[str]) -> Iterator[str]:
    for name in sorted({*listed, *there}):
        if name not in listed:
            yield f"{name} is not in {MANIFEST}"
        elif name not in there:
            yield f"{name} is gone"
        elif digest_of(run / name) != listed[name]:
            yield f"{name} is not what the run left"


def _bound(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
