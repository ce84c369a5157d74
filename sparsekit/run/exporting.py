"""Other forms of a finished model, by the exporters that a recipe names."""

import shutil
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.contracts import Exporter, Finished
from sparsekit.results import masks
from sparsekit.run.plan import Plan


def export(planned: Plan, found: dict[str, Any], output: Path) -> tuple[dict[str, Any], list[str]]:
    """Write model-NAME/ for every exporter that can: by name its size, or why there is none; and what is wrong.

    found: what is known of the run so far

    Raises:
        ValueError: an exporter gives no `sparsekit.contracts.Exporter`.
    """
    patterns = {name: each["pattern"] for name, each in found["sparsity"]["per_linear"].items()}
    quantization = dict.fromkeys(patterns, planned.quantization) if planned.quantization is not None else {}
    finished = Finished(
        output / "model",
        patterns,
        quantization,  # type: ignore[arg-type]
        lambda: masks(output),
        found,
        planned.recipe.model.trust_remote_code,
    )
    written: dict[str, Any] = {}
    failures: list[str] = []
    for name, options in _named(planned).items():
        exporter = registry.load("exporters", name)(**{registry.normal(k): v for k, v in options.items()})
        if not isinstance(exporter, Exporter):
            raise ValueError(
                f"the exporter `{name}` gave a {type(exporter).__name__}, not sparsekit.contracts.Exporter"
            )
        if why := exporter.why_not(finished):
            written[name] = {"why_not": why}
            continue
        target = output / f"model-{name}"
        aside = output / f".{target.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            exporter.write(finished, aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        failures += [f"model-{name}: {each}" for each in exporter.differences(finished, target)]
        sizes = [sum(file.stat().st_size for file in each.iterdir()) for each in (target, finished.folder)]
        written[name] = dict(zip(("bytes", "model_bytes"), sizes, strict=True))
    return written, failures


def _named(planned: Plan) -> dict[str, dict[str, Any]]:
    """The exporters of the recipe with their options; where it names none, packed if weights lie on a grid."""
    if planned.recipe.export is None:
        return {"packed": {}} if planned.quantization is not None else {}
    return {each.name: each.options for each in planned.recipe.export}
