"""`sparsekit fit`: from a checked recipe to a model on disk that is verified, measured and reported."""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from sparsekit import checkpoint, data, evaluate, folder, plan, preview, recipe, report
from sparsekit.blocks import Block, adopt
from sparsekit.commits import (
    Commits,
    disk_errors,
    make_readable,
    sync,
    write_atomically,
    write_json,
    write_tensors,
)
from sparsekit.plan import Plan
from sparsekit.recipe import Recipe
from sparsekit.stream import BlockStream
from sparsekit.verify import verify


def fit(recipe_: Recipe, *, resume: bool = False, dry_run: bool = False, console: Console | None = None) -> int:
    """Run a recipe. Returns 0 when everything asked for is true, 1 when verification failed.

    Raises:
        ValueError: the recipe, the model, the text or the output folder cannot be used; nothing was overwritten.
        OSError: the disk is full or a folder cannot be written; committed blocks are kept.
    """
    console = console or Console()
    with quiet():
        output = Path(str(recipe_.output))
        if not dry_run:
            folder.check(output, resume)
        planned = plan.make(recipe_)
        if dry_run:
            preview.show(planned, console)
            return 0
        with report.Meter() as meter:
            with meter.stage("prepare"):
                tokenizer = checkpoint.tokenizer(planned.folder, trust_remote_code=recipe_.model.trust_remote_code)
                tokens = _tokens(planned, tokenizer)
                texts = _texts(planned, tokenizer)
                fingerprint = folder.fingerprint_of(planned, tokens)
                finished = folder.begin(output, fingerprint)
            if finished:
                folder.clear(output, recipe_.keep)  # it may have been killed while it did so
                verified = json.loads((output / folder.REPORT).read_text(encoding="utf-8"))["verified"] is True
                said = "nothing to do" if verified else "but its result is not as asked"
                console.print(f"{output} is finished, {said}. Look at {output / folder.REPORT}")
                return 0 if verified else 1
            try:
                return _fit(planned, tokenizer, tokens, texts, fingerprint, output, meter, console)
            except OSError as error:
                done = Commits(output / "blocks").count()
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
    recipe_ = planned.recipe
    trust = recipe_.model.trust_remote_code
    settings = recipe_.evaluate.model_dump(exclude={"dense"})
    measured = bool(settings["perplexity"] or settings["tasks"])
    evaluation: dict[str, Any] = {}
    with meter.stage("load"):
        dtype = None if recipe_.model.dtype == "auto" else recipe_.model.dtype
        model, _ = checkpoint.load(planned.folder, dtype=dtype, trust_remote_code=trust)
    if measured and recipe_.evaluate.dense:
        with meter.stage("evaluate dense"):
            console.print("measuring the dense model")
            measure = partial(_measure, planned, model, tokenizer, settings, texts)
            evaluation["dense"] = folder.once(output / "blocks" / "dense.json", settings, measure)
            del measure
    blocks = walk(planned, model, tokens, output, meter, console)
    records = {name: record for block in blocks for name, record in block.records.items()}
    with meter.stage("save"):
        _save(model, tokenizer, blocks, planned.folder, output)
    del model, blocks  # from here on only what is on disk counts
    with meter.stage("verify"):
        proof = verify(
            output / "model",
            against=planned.folder,
            masks=folder.masks(output, planned),
            patterns={name: str(pattern) for name, pattern in planned.patterns.items()},
            cast=dtype is not None,
            trust_remote_code=trust,
        )
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
        "warnings": {name: record["warnings"] for name, record in records.items() if record["warnings"]},
        "skipped": planned.skipped,
        "evaluation": evaluation,
        "verified": proof.failures or True,
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


def walk(
    planned: Plan, model: nn.Module, tokens: Tensor, output: Path, meter: report.Meter, console: Console
) -> list[Block]:
    """Prune the model in memory block by block, committing each; returns the blocks with their masks and records."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from sparsekit.progress import WalkProgress
    from sparsekit.walk import Commit, OneShot, Walk

    recipe_ = planned.recipe
    commits = Commits(output / "blocks")
    blocks = adopt(model, planned.blocks)
    if commits.count() == len(blocks):
        for block in blocks:
            commits.restore(block)
        return blocks
    source = checkpoint.Checkpoint(planned.folder)
    prefix = str(model.base_model_prefix)
    shutil.rmtree(output / "activations", ignore_errors=True)  # of a run that was killed

    def dense_weight(linear: Any) -> Tensor:
        return linear.stored(source.tensor(source.key(f"{linear.name}.weight", prefix)))

    try:
        with meter.stage("capture"):
            stream = BlockStream.over(
                model,
                blocks,
                tokens,
                batch=planned.batch,
                budget=recipe_.memory.activations,
                folder=output / "activations",
                error_correction=recipe_.error_correction,
                dense_weight=dense_weight,
                commits=commits,
            )
            trainer = Trainer(
                accelerator=recipe_.trainer.accelerator,
                devices=recipe_.trainer.devices,
                max_epochs=1,
                logger=CSVLogger(output, name="", version="", flush_logs_every_n_steps=1),
                callbacks=[
                    OneShot(planned.solver(meter), planned.patterns, recipe_.seed),
                    Commit(commits),
                    WalkProgress(console),
                ],
                enable_checkpointing=False,  # committed blocks are the checkpoint
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            try:
                trainer.fit(Walk(stream), stream)
            except SystemExit as stop:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from stop
            stream.close()
    finally:
        shutil.rmtree(output / "activations", ignore_errors=True)
    return blocks


def evaluate_path(model: str | dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure any model that a recipe's `model` could name: what `evaluate.evaluate` gives."""
    trust = isinstance(model, dict) and bool(model.get("trust_remote_code"))
    with quiet():
        loaded, tokenizer = checkpoint.load(checkpoint.locate(model), trust_remote_code=trust)
        return evaluate.evaluate(loaded, tokenizer, settings)


def _measure(planned: Plan, model: nn.Module, tokenizer: Any, settings: dict[str, Any], texts: Any) -> dict[str, Any]:
    """Measure a model on the accelerator that the recipe walks on; afterwards it is in CPU memory again."""
    try:
        return evaluate.evaluate(model.to(planned.device), tokenizer, settings, texts)
    finally:
        model.to("cpu")


def _tokens(planned: Plan, tokenizer: Any) -> Tensor:
    """The calibration tokens (samples, length)."""
    settings = planned.recipe.calibration.model_dump(exclude={"batch"})
    return data.calibration_tokens(settings, tokenizer, planned.positions, planned.config.vocab_size)


def _texts(planned: Plan, tokenizer: Any) -> dict[str, Tensor]:
    """The windows of every perplexity set, read before the model is, so that a mistake costs no time."""
    settings = planned.recipe.evaluate.model_dump(exclude={"dense"})
    evaluate.check(settings)
    return evaluate.texts(settings, tokenizer, planned.positions)


def _save(model: Any, tokenizer: Any, blocks: list[Block], source: Path, output: Path) -> None:
    """Write model/ aside and move it into place, with the masks beside it."""
    from transformers import GenerationConfig

    aside, target = output / ".model.part", output / "model"
    shutil.rmtree(aside, ignore_errors=True)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig()  # the source's own file is copied, even if it is not valid
    with disk_errors(aside):
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", aside / "generation_config.json")
    for file in aside.iterdir():
        make_readable(file)
        sync(file)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync(output)
    commits = Commits(output / "blocks")
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
    console.print("\nLoad it:\n")
    console.print(report.loading(str(output / "model")), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notices (tips, bars, devices found) off the user's terminal."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=".*configure_optimizers.*")
        yield
