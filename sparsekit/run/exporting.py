"""Other forms of a finished model, by the exporters that a recipe or a command names."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.contracts import Exporter, Finished
from sparsekit.maths import Quantization
from sparsekit.results import masks, read_manifest, read_report
from sparsekit.results.page import add_to_report, require_finished
from sparsekit.run.plan import Plan
from sparsekit.system import human_size

PROOF = "proof.json"  # in the folder of an export that says what it was compared with


def export(planned: Plan, found: dict[str, Any], output: Path) -> tuple[dict[str, Any], list[str]]:
    """Write model-NAME/ for every exporter of a recipe that can: by name its size, or why there is none; what is wrong.

    found: what is known of the run so far

    Raises:
        ValueError: an exporter gives no `sparsekit.contracts.Exporter`.
    """
    finished = _finished(output, found, planned.quantization, planned.recipe.model.trust_remote_code)
    written: dict[str, Any] = {}
    failures: list[str] = []
    for name, options in _named(planned).items():
        written[name], wrong = _export(finished, name, options, output)
        failures += wrong
    return written, failures


def export_run(
    run: str | Path, name: str, options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The same by one exporter, of a run that is finished: model-NAME/ in its folder, told in its report.

    Returns:
        its size and what proved it, or why it cannot be written; and what is wrong, in which case nothing is kept.

    Raises:
        ValueError: the folder holds no finished run, there is no such exporter, or it has no such options.
    """
    run = Path(run)
    require_finished(run)
    given = dict(options or {})
    entry = registry.find("exporters", name)
    if wrong := registry.check_options(registry.load("exporters", name), given, f"exporter `{entry.name}`"):
        raise ValueError("; ".join(wrong))
    report = read_report(run)
    grid = ((read_manifest(run) or {}).get("claims") or {}).get("quantization")
    trust = bool((report["recipe"].get("model") or {}).get("trust_remote_code"))
    finished = _finished(run, report, Quantization.of(grid) if grid else None, trust)
    written, failures = _export(finished, entry.name, given, run)
    if not failures:
        add_to_report(run, {"exports": (report.get("exports") or {}) | {entry.name: written}})
    return written, failures


def _finished(run: Path, found: Mapping[str, Any], grid: Quantization | None, trust: bool) -> Finished:
    patterns = {name: each["pattern"] for name, each in found["sparsity"]["per_linear"].items()}
    quantization = dict.fromkeys(patterns, grid) if grid is not None else {}
    return Finished(run / "model", patterns, quantization, lambda: masks(run), found, trust)


def _export(finished: Finished, name: str, options: Mapping[str, Any], run: Path) -> tuple[dict[str, Any], list[str]]:
    """Write one form aside, compare it, and move it into place only where it is what it should be."""
    exporter = registry.load("exporters", name)(**{registry.normal(key): value for key, value in options.items()})
    if not isinstance(exporter, Exporter):
        raise ValueError(f"the exporter `{name}` gave a {type(exporter).__name__}, not sparsekit.contracts.Exporter")
    if why := exporter.why_not(finished):
        return {"why_not": why}, []
    target = run / f"model-{name}"
    aside = run / f".{target.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        exporter.write(finished, aside)
        if wrong := exporter.differences(finished, aside):
            return {"why_not": wrong[0]}, [f"model-{name}: {each}" for each in wrong]
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sizes = [sum(file.stat().st_size for file in each.iterdir()) for each in (target, finished.folder)]
    written: dict[str, Any] = dict(zip(("bytes", "model_bytes"), sizes, strict=True))
    if (target / PROOF).is_file():
        written["proof"] = json.loads((target / PROOF).read_text(encoding="utf-8"))
    return written, []


def _named(planned: Plan) -> dict[str, dict[str, Any]]:
    """The exporters of the recipe with their options; where it names none, packed if weights lie on a grid."""
    if planned.recipe.export is None:
        return {"packed": {}} if planned.quantization is not None else {}
    return {each.name: each.options for each in planned.recipe.export}


def said_of(name: str, written: Mapping[str, Any], where: Path) -> str:
    """What an exporter did, in a sentence."""
    if "why_not" in written:
        return f"not {name}: {written['why_not']}"
    said = f"{name}: {where}, {human_size(written['bytes'])} instead of {human_size(written['model_bytes'])}"
    proof = written.get("proof") or {}
    if proof.get("ran"):
        said += (
            f"; in {proof['client']} {proof['tokens']} next tokens after {proof['texts']} texts have log-probabilities "
            f"within {proof['log-probabilities within']}"
        )
    return f"{said}; {proof['said']}" if proof.get("said") else said
