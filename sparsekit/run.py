"""`sparsekit fit`: from a checked recipe to a model on disk that is verified, measured and reported."""

import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from sparsekit import checkpoint, data, evaluate, folder, images, page, plan, preview, recipe, report, result
from sparsekit.commits import Commits, write_atomically, write_json
from sparsekit.pattern import Pattern, parse
from sparsekit.plan import Plan
from sparsekit.quiet import quiet
from sparsekit.recipe import Recipe
from sparsekit.samples import PROMPTS, samples
from sparsekit.structure import storage


def fit(recipe_: Recipe, *, resume: bool = False, dry_run: bool = False, console: Console | None = None) -> int:
    """Run a recipe. Returns 0 when everything asked for is true, 1 when verification failed.

    Raises:
        ValueError: the recipe, the model, the text or the output folder cannot be used; nothing was overwritten.
        OSError: the disk is full or a folder cannot be written; committed blocks are kept.
    """
    from sparsekit import parallel

    console = console or Console()
    with quiet():
        output = Path(str(recipe_.output))
        leads = parallel.rank() == 0  # of several processes that run this recipe, the first writes and talks
        if dry_run:
            preview.show(plan.make(recipe_), console)
            return 0
        if leads:
            folder.check(output, resume)
        else:
            console = Console(quiet=True)
            parallel.die_with_parent()
        planned = plan.make(recipe_)
        parallel.divide_threads(recipe_.trainer.devices)
        with report.Meter() as meter:
            with meter.stage("prepare"):
                tokenizer = checkpoint.tokenizer(planned.folder, trust_remote_code=recipe_.model.trust_remote_code)
                tokens = _tokens(planned, tokenizer)
                texts = _texts(planned, tokenizer)
                fingerprint = folder.fingerprint_of(planned, tokens)
                finished = folder.begin(output, fingerprint) if leads else (output / folder.REPORT).is_file()
            if finished and not leads:
                return 0
            if finished:
                folder.clear(output, recipe_.keep)  # it may have been killed while it did so
                page.write(output)
                verified = json.loads((output / folder.REPORT).read_text(encoding="utf-8"))["verified"] is True
                said = "nothing to do" if verified else "but its result is not as asked"
                console.print(f"{output} is finished, {said}. Look at {output / folder.REPORT}")
                return 0 if verified else 1
            try:
                return _fit(planned, tokenizer, tokens, texts, fingerprint, output, meter, console)
            except OSError as error:
                done = len(Commits(output / "blocks").done())
                raise OSError(
                    f"{error}. {done} of {len(planned.blocks)} blocks are committed in {output}; "
                    "make room or repair the folder, then run the same command with --resume"
                ) from error


def _fit(
    planned: Plan,
    tokenizer: Any,
    tokens: Tensor,
    texts: dict[str, Tensor],
    fingerprint: dict[str, Any],
    output: Path,
    meter: report.Meter,
    console: Console,
) -> int:
    from sparsekit import parallel
    from sparsekit.pipeline import prune

    recipe_ = planned.recipe
    trust = recipe_.model.trust_remote_code
    settings = recipe_.evaluate.model_dump(exclude={"dense", "samples"})
    measured = bool(settings["perplexity"] or settings["tasks"] or settings["accuracy"])
    evaluation: dict[str, Any] = {}
    with meter.stage("load"):
        dtype = None if recipe_.model.dtype == "auto" else recipe_.model.dtype
        model, _ = storage.load(planned.folder, dtype=dtype, trust_remote_code=trust)
    if measured and recipe_.evaluate.dense and parallel.rank() == 0:
        with meter.stage("evaluate dense"):
            console.print("measuring the dense model")
            dense = model
            if planned.dense != planned.folder:
                dense, _ = storage.load(planned.dense, dtype=dtype, trust_remote_code=trust)
            measure = partial(_measure, planned, dense, tokenizer, settings, texts)
            evaluation["dense"] = folder.once(output / "blocks" / "dense.json", settings, measure)
            del measure, dense
    if planned.postponed:
        with meter.stage("allocate"):
            planned.patterns = _allocated(planned, model, tokens, output, console)
    outcome = prune(planned, model, tokens, output, meter, console)
    if parallel.rank():  # the first process does the rest
        return 0
    parallel.leave()
    with meter.stage("save"):
        shape = result.save(planned, model, tokenizer, outcome, output)
    found, changed, cuts = result.facts(planned, outcome, shape), result.changed(outcome), outcome.cuts
    del model, outcome  # from here on only what is on disk counts
    with meter.stage("verify"):
        patterns = {name: each["pattern"] for name, each in found["sparsity"]["per_linear"].items()}
        failures = result.prove(planned, output, cuts, patterns, changed)
    if planned.quantization and not failures:
        found["packed"], failures = result.pack(planned, output)
    if measured:
        with meter.stage("evaluate pruned"):
            console.print("measuring the pruned model, loaded from disk")
            pruned, _ = storage.load(output / "model", trust_remote_code=trust)
            evaluation["pruned"] = _measure(planned, pruned, tokenizer, settings, texts)
    complete = {
        "model": {"name": recipe_.model.path, "class": planned.model.__class__.__name__, "dtype": str(dtype or "auto")},
        "recipe": planned.resolved,
        "versions": report.versions(planned.packages()),
        "hardware": report.hardware(),
        "stages": meter.stages(),
        **found,
        "evaluation": evaluation,
        "samples": _side_by_side(evaluation),
        "verified": failures or True,
        "fingerprint": fingerprint,
    }
    yaml = recipe.dump(planned.resolved)
    write_atomically(output / "recipe.yaml", lambda aside: aside.write_text(yaml, encoding="utf-8"))
    card = report.model_card(complete, yaml, storage.loading(output / "model"))
    write_atomically(output / "model" / "README.md", lambda aside: aside.write_text(card, encoding="utf-8"))
    write_json(output / folder.REPORT, complete)
    page.write(output)
    folder.clear(output, recipe_.keep)
    _close(complete, output, console)
    return 0 if not failures else 1


def evaluate_path(model: str | dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure any model that a recipe's `model` could name: what `evaluate.evaluate` gives."""
    trust = isinstance(model, dict) and bool(model.get("trust_remote_code"))
    with quiet():
        loaded, tokenizer = storage.load(checkpoint.locate(model), trust_remote_code=trust)
        return evaluate.evaluate(loaded, tokenizer, settings)


def _measure(planned: Plan, model: nn.Module, tokenizer: Any, settings: dict[str, Any], texts: Any) -> dict[str, Any]:
    """Measure a model on the accelerator that the recipe walks on; afterwards it is in CPU memory again."""
    from sparsekit import parallel

    try:
        with parallel.alone():
            found: dict[str, Any] = evaluate.evaluate(model.to(planned.device), tokenizer, settings, texts)
            if planned.recipe.evaluate.samples and not planned.images:
                found["samples"] = samples(model, tokenizer)
            return found
    finally:
        model.to("cpu")


def _side_by_side(evaluation: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """What the dense and the pruned model say to the same prompts; taken out of their measurements."""
    said = {name: texts for name, found in evaluation.items() if (texts := found.pop("samples", []))}
    return [
        {"prompt": prompt} | {name: texts[index] for name, texts in said.items()}
        for index, prompt in enumerate(PROMPTS)
        if said
    ]


def _allocated(planned: Plan, model: nn.Module, tokens: Tensor, output: Path, console: Console) -> dict[str, Pattern]:
    """The patterns by a rule that looks at the dense model; a resumed run, or another process, reads them."""
    from sparsekit import parallel

    file = output / "blocks" / "allocation.json"

    def measure() -> dict[str, str]:
        console.print(f"a pass through the dense model, for allocation by {planned.recipe.allocation.name}")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patterns = plan.measure(planned, model, tokens, output / "activations")
        for warning in said:
            console.print(f"[yellow]warning[/]: {warning.message}", highlight=False)
        return {name: str(pattern) for name, pattern in patterns.items()}

    while parallel.rank() and not file.is_file():
        time.sleep(0.1)  # for the first process
    settings = {key: planned.resolved[key] for key in ("pattern", "allocation")}
    return {name: parse(text) for name, text in folder.once(file, settings, measure).items()}


def _tokens(planned: Plan, tokenizer: Any) -> Tensor:
    """The calibration tokens (samples, length), or pixels (samples, channels, height, width)."""
    settings = planned.recipe.calibration.model_dump(exclude={"batch"})
    if planned.images:
        return images.calibration_images(settings, tokenizer, images.channels_of(planned.config))
    return data.calibration_tokens(settings, tokenizer, planned.positions, planned.config.vocab_size)


def _texts(planned: Plan, tokenizer: Any) -> dict[str, Tensor]:
    """The windows of every perplexity set, read before the model is, so that a mistake costs no time."""
    settings = planned.recipe.evaluate.model_dump(exclude={"dense", "samples"})
    evaluate.check(settings)
    for entry in settings["accuracy"]:
        images.labelled(entry).classes(planned.model)
    return evaluate.texts(settings, tokenizer, planned.positions)


def _close(complete: dict[str, Any], output: Path, console: Console) -> None:
    console.print()
    console.print(report.closing_table(complete, str(output)))
    said = {sentence for sentences in complete["warnings"].values() for sentence in sentences}
    for sentence in sorted(said):
        count = sum(sentence in sentences for sentences in complete["warnings"].values())
        console.print(f"[yellow]warning[/] ({count} linears): {sentence}", highlight=False)
    for name, why in complete["skipped"].items():
        console.print(f"left as it is: {name} ({why})", highlight=False)
    if complete["verified"] is not True:
        for failure in complete["verified"]:
            console.print(f"[bold red]verification failed[/]: {failure}", highlight=False)
        return
    if "packed" in complete:
        console.print(_said_of(complete["packed"], output / "model-packed"), highlight=False)
    console.print("\nLoad it:\n")
    console.print(storage.loading(output / "model"), markup=False, highlight=False, soft_wrap=True)


def _said_of(packed: dict[str, Any], where: Path) -> str:
    if "why_not" in packed:
        return f"not packed: {packed['why_not']}"
    sizes = f"{report.size(packed['bytes'])} instead of {report.size(packed['simulated_bytes'])}"
    return f"packed: {where}, {sizes}; it loads where compressed-tensors is installed"
