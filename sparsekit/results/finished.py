"""Proof of a finished run from its folder: manifest, masks, patterns, source."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsekit.maths import Quantization
from sparsekit.model import read_json
from sparsekit.results.folder import MASKS, REPORT
from sparsekit.results.manifest import (
    MANIFEST,
    binding_failures,
    manifest_failures,
    read_manifest,
    source_failures,
)
from sparsekit.results.stored import Masks
from sparsekit.results.verification import Verification, verify

HASHING = 2  # files at a time


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path names, itself or by its model/; None: no run is there."""
    for folder in (path, path.parent if path.name == "model" else path):
        left = (folder / REPORT).exists() or (folder / MANIFEST).exists()  # whatever became of the other
        if left and (folder / "model").is_dir():
            return folder
    return None


def verify_run(
    run: Path, pattern: str | None = None, against: Path | None = None, *, trust_remote_code: bool = False
) -> Verification:
    """Prove that a run's folder holds what the run left, and that this is what it says.

    pattern: as in `verify`, beside what the run itself claims; against: the source

    Raises:
        ValueError: the folder holds no checkpoint, or its manifest cannot be read.
    """
    manifest = read_manifest(run)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if manifest is None:
        if read_json(run / REPORT).get("manifest"):
            return Verification(failures=["report.json names a manifest, and manifest.json is gone"])
        found = verify(run / "model", pattern, against, **options)
        found.unproved.append("the run is of an earlier format and has no manifest: what lies beside model/")
        return found
    if failures := binding_failures(manifest):
        return Verification(failures=failures)
    with ThreadPoolExecutor(HASHING) as pool:  # files are hashed while tensors are looked at
        files = pool.submit(manifest_failures, run, manifest)
        source = pool.submit(source_failures, manifest, against) if against is not None else None
        try:
            found = _as_claimed(run, manifest["claims"], pattern, against, options)
        except Exception:  # whatever a damaged file makes of a library
            if not files.result():
                raise
        if failures := files.result():  # of what was changed nothing is to be believed
            return Verification(failures=failures)
        found.failures += source.result() if source is not None else []
    found.failures = list(dict.fromkeys(found.failures))
    return found


def _as_claimed(
    run: Path, claims: dict[str, Any], pattern: str | None, against: Path | None, options: dict[str, Any]
) -> Verification:
    """What the tensors say of what the manifest claims, and of the pattern that is asked for."""
    grid = claims.get("quantization")
    found = verify(
        run / "model",
        against=against,
        masks=Masks(run) if (run / MASKS).is_file() else None,
        patterns=claims["patterns"],
        quantization=Quantization.of(grid) if grid else None,
        changed=claims["changed"],
        cast=claims["cast"],
        **options,
    )
    if pattern is not None:
        found.failures += verify(run / "model", pattern, **options).failures
    return found


def finished_failures(run: Path) -> list[str]:
    """Where a finished run is not what it left, by its manifest; nothing is known of one without."""
    manifest = read_manifest(run)
    if manifest is not None:
        # killed before the last list was written, it has none
        return manifest_failures(run, manifest, told=bool(manifest.get("told")))
    if (run / "blocks").is_dir():
        return [f"there is a {REPORT}, and neither a manifest nor an end of the run"]
    return [] if (run / "model" / "config.json").is_file() else ["model/ is gone"]
