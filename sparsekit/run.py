"""`sparsekit fit`: from a checked recipe to a model on disk that is verified, measured and reported."""

import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from sparsekit import checkpoint, data, evaluate, folder, plan, preview, recipe, report
from sparsekit.blocks import Block
from sparsekit.commits import (
    Commits,
    disk_errors,
    make_readable,
    sync,
    write_atomically,
    write_json,
    write_tensors,
)
from sparsekit.export import differences, export_packed
from sparsekit.pattern import Pattern, parse
from sparsekit.plan import Plan
from sparsekit.recipe import Recipe
from sparsekit.verify import verify


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
    settings = recipe_.evaluate.model_dump(exclude={"dense"})
    measured = bool(settings["perplexity"] or settings["tasks"])
    evaluation: dict[str, Any] = {}
    with meter.stage("load"):
        dtype = None if recipe_.model.dtype == "auto" else recipe_.model.dtype
        model, _ = checkpoint.load(planned.folder, dtype=dtype, trust_remote_code=trust)
    if measured and recipe_.evaluate.dense and parallel.rank() == 0:
        with meter.stage("evaluate dense"):
            console.print("measuring the dense model")
            measure = partial(_measure, planned, model, tokenizer, settings, texts)
            evaluation["dense"] = folder.once(output / "blocks" / "dense.json", settings, measure)
            del measure
    if planned.postponed:
        with meter.stage("allocate"):
            planned.patterns = _allocated(planned, model, tokens, output, console)
    blocks = prune(planned, model, tokens, output, meter, console)
    if parallel.rank():  # the first process does the rest
        return 0
    parallel.leave()
    records = {name: record for block in blocks for name, record in block.records.items()}
    notes = {block.name: block.notes for block in blocks if block.notes}
    trained = {f"{block.name}.{inner}" for block in blocks for inner in block.trained}
    with meter.stage("save"):
        _save(planned, model, tokenizer, blocks, output)
    del model, blocks  # from here on only what is on disk counts
    with meter.stage("verify"):
        proof = verify(
            output / "model",
            against=planned.folder,
            masks=folder.masks(output, planned),
            patterns={name: record["pattern"] for name, record in records.items()},
            quantization=planned.quantization,
            trained=trained,
            cast=dtype is not None,
            trust_remote_code=trust,
        )
    packed = _pack(planned, output) if planned.quantization and not proof.failures else {}
    if "bytes" in packed:
        proof.failures += differences(output / "model-packed", output / "model")
    if measured:
        with meter.stage("evaluate pruned"):
            console.print("measuring the pruned model, loaded from disk")
            pruned, _ = checkpoint.load(output / "model", trust_remote_code=trust)
            evaluation["pruned"] = _measure(planned, pruned, tokenizer, settings, texts)
    zeros, parameters = (sum(record[key] for record in records.values()) for key in ("zeros", "parameters"))
    per_linear = {
        name: {key: record[key] for key in ("sparsity", "pattern", "zeros", "parameters")}
        for name, record in records.items()
    }
    result = {
        "model": {"name": recipe_.model.path, "class": planned.model.__class__.__name__, "dtype": str(dtype or "auto")},
        "recipe": planned.resolved,
        "versions": report.versions(planned.packages()),
        "hardware": report.hardware(),
        "stages": meter.stages(),
        "sparsity": {
            "total": zeros / parameters,
            "zeros": zeros,
            "parameters": parameters,
            "per_linear": per_linear,
        },
        "error": {name: record["error"] for name, record in records.items()},
        "blocks": notes,
        "warnings": {name: record["warnings"] for name, record in records.items() if record["warnings"]},
        "skipped": planned.skipped,
        "evaluation": evaluation,
        "verified": proof.failures or True,
        **({"packed": packed} if packed else {}),
        "fingerprint": fingerprint,
    }
    yaml = recipe.dump(planned.resolved)
    write_atomically(output / "recipe.yaml", lambda aside: aside.write_text(yaml, encoding="utf-8"))
    card = report.model_card(result, yaml, str(output / "model"))
    write_atomically(output / "model" / "README.md", lambda aside: aside.write_text(card, encoding="utf-8"))
    write_json(output / folder.REPORT, result)
    folder.clear(output, recipe_.keep)
    _close(result, output, console)
    return 0 if not proof.failures else 1


def _pack(planned: Plan, output: Path) -> dict[str, Any]:
    """Write model-packed/ where the layout allows it; its size, or why there is none."""
    source, target = output / "model", output / "model-packed"
    assert planned.quantization is not None
    settings = dict.fromkeys(planned.patterns, planned.quantization)
    try:
        export_packed(source, target, settings, trust_remote_code=planned.recipe.model.trust_remote_code)
    except ValueError as error:
        return {"why_not": str(error)}
    sizes = {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in (source, target)}
    return {"bytes": sizes[target.name], "simulated_bytes": sizes[source.name]}


def evaluate_path(model: str | dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure any model that a recipe's `model` could name: what `evaluate.evaluate` gives."""
    trust = isinstance(model, dict) and bool(model.get("trust_remote_code"))
    with quiet():
        loaded, tokenizer = checkpoint.load(checkpoint.locate(model), trust_remote_code=trust)
        return evaluate.evaluate(loaded, tokenizer, settings)


def _measure(planned: Plan, model: nn.Module, tokenizer: Any, settings: dict[str, Any], texts: Any) -> dict[str, Any]:
    """Measure a model on the accelerator that the recipe walks on; afterwards it is in CPU memory again."""
    from sparsekit import parallel

    try:
        with parallel.alone():
            return evaluate.evaluate(model.to(planned.device), tokenizer, settings, texts)
    finally:
        model.to("cpu")


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
    """The calibration tokens (samples, length)."""
    settings = planned.recipe.calibration.model_dump(exclude={"batch"})
    return data.calibration_tokens(settings, tokenizer, planned.positions, planned.config.vocab_size)


def _texts(planned: Plan, tokenizer: Any) -> dict[str, Tensor]:
    """The windows of every perplexity set, read before the model is, so that a mistake costs no time."""
    settings = planned.recipe.evaluate.model_dump(exclude={"dense"})
    evaluate.check(settings)
    return evaluate.texts(settings, tokenizer, planned.positions)


def _save(planned: Plan, model: Any, tokenizer: Any, blocks: list[Block], output: Path) -> None:
    """Write model/ aside and move it into place, with the masks beside it."""
    from transformers import GenerationConfig

    aside, target = output / ".model.part", output / "model"
    shutil.rmtree(aside, ignore_errors=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig()  # the source's own file is copied, even if it is not valid
    with disk_errors(aside):
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    if (planned.folder / "generation_config.json").is_file():
        shutil.copyfile(planned.folder / "generation_config.json", aside / "generation_config.json")
    for file in aside.iterdir():
        make_readable(file)
        sync(file)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync(output)
    commits = folder.commits(output, len(planned.segments) - 1)
    bits = {name: mask for block in blocks for name, mask in commits.masks(block).items()}
    write_atomically(output / "masks.safetensors", lambda file: write_tensors(file, bits))


def _close(result: dict[str, Any], output: Path, console: Console) -> None:
    console.print()
    console.print(report.closing_table(result, str(output)))
    said = {sentence for sentences in result["warnings"].values() for sentence in sentences}
    for sentence in sorted(said):
        count = sum(sentence in sentences for sentences in result["warnings"].values())
        console.print(f"[yellow]warning[/] ({count} linears): {sentence}", highlight=False)
    for name, why in result["skipped"].items():
        console.print(f"left as it is: {name} ({why})", highlight=False)
    if result["verified"] is not True:
        for failure in result["verified"]:
            console.print(f"[bold red]verification failed[/]: {failure}", highlight=False)
        return
    if "packed" in result:
        console.print(_said_of(result["packed"], output / "model-packed"), highlight=False)
    console.print("\nLoad it:\n")
    console.print(report.loading(str(output / "model")), markup=False, highlight=False, soft_wrap=True)


def _said_of(packed: dict[str, Any], where: Path) -> str:
    if "why_not" in packed:
        return f"not packed: {packed['why_not']}"
    sizes = f"{report.size(packed['bytes'])} instead of {report.size(packed['simulated_bytes'])}"
    return f"packed: {where}, {sizes}; it loads where compressed-tensors is installed"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notices (tips, bars, devices found) off the user's terminal."""
    import transformers.utils.logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*configure_optimizers.*")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
