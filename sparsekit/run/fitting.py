"""`sparsekit fit`: from a checked recipe to a model on disk that is verified, measured and reported."""

import json
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from sparsekit.maths import Pattern, Unstructured, parse
from sparsekit.measure import (
    FirstToken,
    Ready,
    beginning,
    check_evaluation,
    first_token,
)
from sparsekit.model import load as load_model
from sparsekit.model import (
    load_resting,
    load_tokenizer,
    loading_code,
    tower_name,
)
from sparsekit.recipe import Recipe, effect_of, to_yaml
from sparsekit.results import (
    REPORT,
    clear_working_files,
    closing_table,
    finished_failures,
    model_card,
    read_report,
    shareable,
    write_manifest,
)
from sparsekit.results.page import write_page
from sparsekit.run import plan, preview, result
from sparsekit.run.ahead import check_carried
from sparsekit.run.calibration import calibration_of
from sparsekit.run.claim import check_output, claim_output, fingerprint_of, measured_once
from sparsekit.run.exporting import export, said_of
from sparsekit.run.lock import locked
from sparsekit.run.measured import measured_patterns
from sparsekit.run.measuring import measure_model, measures, ready_for, settings_of, side_by_side
from sparsekit.run.plan import Plan
from sparsekit.run.preview import left_as_is
from sparsekit.run.shared import Common, Shared
from sparsekit.system import Meter, hardware, session, versions, write_atomically, write_json
from sparsekit.walk import count_committed

BESIDE = "of the model without the update in adapter/, which was not merged"


def run_recipe(
    recipe_: Recipe,
    *,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    shared: Shared | None = None,
) -> int:
    """Run a recipe. Returns 0 when everything asked for is true, 1 when verification failed.

    shared: of several runs that differ in their pattern alone, what they have in common; None: it is the only one

    Raises:
        ValueError: the recipe, the model, the text or the output folder cannot be used; nothing was overwritten.
        OSError: the disk is full or a folder cannot be written; committed blocks are kept.
    """
    from sparsekit.run.plugged import check_classes
    from sparsekit.system import die_with_parent, divide_threads, process_rank

    console = console or Console()
    with session():
        output = Path(str(recipe_.output))
        leads = process_rank() == 0  # of several processes that run this recipe, the first writes and talks
        if dry_run:
            check_evaluation(settings_of(recipe_))
            preview.show_plan(plan.make_plan(recipe_), console)
            return 0
        if leads:
            check_output(output, resume)
        else:
            console = Console(quiet=True)
            die_with_parent()
        planned = plan.make_plan(recipe_)
        check_classes(recipe_.trainer)
        divide_threads(recipe_.trainer.devices)
        with locked(output) if leads else nullcontext():
            return _run(planned, output, leads, console, shared or Shared())


def _run(planned: Plan, output: Path, leads: bool, console: Console, shared: Shared) -> int:
    """Go through with a plan, or say that it is finished. leads: of several processes, this one writes and talks"""
    recipe_ = planned.recipe
    with Meter() as meter:
        with meter.stage("prepare"):
            console.print("reading the texts and the source's digests", style="dim")
            tokenizer = planned.source.tokenizer() if planned.source.tokenizer else None
            _kept(planned, tokenizer)  # missing files are told now
            first = shared.once("first", lambda: _first_token(planned, tokenizer, console))
            tokens = shared.once("tokens", lambda: calibration_of(planned, tokenizer, first.token))
            ready = shared.once("ready", lambda: ready_for(planned, tokenizer, first.token))
            fingerprint = fingerprint_of(planned, tokens)
            finished = claim_output(output, fingerprint) if leads else (output / REPORT).is_file()
        if finished:
            return _already(output, recipe_, console) if leads else 0
        try:
            same = fingerprint | {"recipe": {**fingerprint["recipe"], "pattern": None}}
            common = None if shared.folder is None else Common(shared.folder, same)
            return _fit(planned, tokenizer, tokens, ready, first, fingerprint, output, meter, console, common)
        except OSError as error:
            done = count_committed(output / "blocks")
            raise OSError(
                f"{error}. {done} of {len(planned.blocks)} blocks are committed in {output}; "
                "make room or repair the folder, then run the same command with --resume"
            ) from error


def _already(output: Path, recipe_: Recipe, console: Console) -> int:
    """Nothing is left to do, if everything is still there."""
    if failures := finished_failures(output):
        raise ValueError(
            f"{output} was finished, and is not what the run left: {failures[0]}; restore that, or remove "
            f"{output / REPORT} to have the run made again"
        )
    clear_working_files(output, recipe_.keep)  # it may have been killed while it did so
    write_page(output)
    verified = read_report(output, "verified")["verified"] is True
    said = "nothing to do" if verified else "but its result is not as asked"
    console.print(f"{output} is finished, {said}. Look at {output / REPORT}", markup=False)
    return 0 if verified else 1


def _fit(
    planned: Plan,
    tokenizer: Any,
    tokens: Tensor,
    ready: Ready,
    first: FirstToken,
    fingerprint: dict[str, Any],
    output: Path,
    meter: Meter,
    console: Console,
    common: Common | None,
) -> int:
    from sparsekit.run.sequence import run_stages
    from sparsekit.system import leave_group, process_rank

    recipe_ = planned.recipe
    trust = recipe_.model.trust_remote_code
    settings = settings_of(recipe_)
    measured = measures(recipe_)
    evaluation: dict[str, Any] = {}
    with meter.stage("load"):
        console.print(f"opening {planned.model.__class__.__name__}, {len(planned.blocks)} blocks", style="dim")
        dtype = None if recipe_.model.dtype == "auto" else recipe_.model.dtype
        model = load_resting(planned.folder, like=planned.model, dtype=dtype, trust_remote_code=trust)
        check_carried(recipe_, model, planned.blocks, tokens)
    if measured and recipe_.evaluate.dense and process_rank() == 0:
        with meter.stage("evaluate dense"):
            console.print("measuring the dense model")
            dense = model
            known = planned.blocks
            if planned.dense != planned.folder:
                dense = load_resting(planned.dense, like=planned.model, dtype=dtype, trust_remote_code=trust)
                known = plan.blocks_in(planned.dense, planned.model, trust_remote_code=trust)
            measure = partial(measure_model, planned, dense, known, tokenizer, settings, ready)
            file, of = output / "blocks" / "dense.json", settings
            if common is not None:  # in no run's own folder, which its fingerprint guards: it says what it is of
                file, of = common.folder / "dense.json", json.loads(json.dumps(settings | {"of": common.of}))
            evaluation["dense"] = measured_once(file, of, measure)
            del measure, dense, known
    if planned.postponed:
        with meter.stage("allocate"):
            planned = replace(planned, patterns=_allocated(planned, model, tokens, output, console))
    outcome = run_stages(planned, model, tokens, output, meter, console, first.token, common)
    if process_rank():  # the first process does the rest
        return 0
    leave_group()
    with meter.stage("save"):
        shape = result.save(planned, model, _kept(planned, tokenizer), outcome, output)
    found, changed, cuts = result.facts(planned, outcome, shape), result.changed(outcome), outcome.cuts
    known = outcome.blocks
    del model, outcome  # from here on only what is on disk counts
    with meter.stage("verify"):
        patterns = {name: each["pattern"] for name, each in found["sparsity"]["per_linear"].items()}
        failures = result.prove(planned, output, cuts, patterns, changed)
    if effect_of(recipe_.stages[-1]).unmerged:
        found["notes"] = found.get("notes", {}) | {"adapter": {"figures": BESIDE}}
    found["exports"] = {}
    if not failures:
        found["exports"], failures = export(planned, found, output)
    if measured:
        with meter.stage("evaluate pruned"):
            console.print("measuring the pruned model, loaded from disk")
            pruned = load_resting(output / "model", like=planned.model, trust_remote_code=trust)
            evaluation["pruned"] = measure_model(planned, pruned, known, tokenizer, settings, ready)
    complete = {
        "model": {"name": recipe_.model.path, "class": planned.model.__class__.__name__, "dtype": str(dtype or "auto")},
        "recipe": planned.resolved,
        "versions": versions(planned.packages()),
        "hardware": hardware(),
        "stages": meter.stages(),
        **found,
        "bos": {"asked": recipe_.bos, "used": first.used, "why": first.why},
        "evaluation": evaluation,
        "samples": side_by_side(evaluation),
        "verified": failures or True,
        "fingerprint": fingerprint,
    }
    yaml = to_yaml(planned.resolved)
    write_atomically(output / "recipe.yaml", lambda aside: aside.write_text(yaml, encoding="utf-8"))
    claims = result.claims(planned, found, changed, shape)
    source = planned.folder if planned.folder.is_dir() else None
    complete["manifest"] = write_manifest(output, source, claims, complete["versions"])
    folder = output / "model"
    loading = loading_code(folder).replace(str(folder), f"{output.name}/model")
    card = model_card(complete, to_yaml(shareable(planned.resolved)), loading)
    write_atomically(output / "model" / "README.md", lambda aside: aside.write_text(card, encoding="utf-8"))
    write_json(output / REPORT, complete)
    write_page(output)
    clear_working_files(output, recipe_.keep)
    _close(complete, output, console)
    return 0 if not failures else 1


def _allocated(planned: Plan, model: nn.Module, tokens: Tensor, output: Path, console: Console) -> dict[str, Pattern]:
    """The patterns by a rule that looks at the dense model; a resumed run, or another process, reads them."""
    from sparsekit.system import process_rank

    file = output / "blocks" / "allocation.json"

    def measure() -> dict[str, list[Any]]:
        console.print(
            f"a pass through the dense model, for allocation by {planned.recipe.allocation.name}", markup=False
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patterns = measured_patterns(planned, model, tokens, output / "activations")
        for warning in said:
            console.print(f"[yellow]warning[/]: {escape(str(warning.message))}", highlight=False)
        return {name: [str(pattern), *getattr(pattern, "rows", ())] for name, pattern in patterns.items()}

    while process_rank() and not file.is_file():
        time.sleep(0.1)  # for the first process
    settings = {key: planned.resolved[key] for key in ("pattern", "allocation")}
    settings["values"] = "pattern, factors of rows"  # what earlier versions left had the patterns alone
    found = {name: (parse(text), tuple(rows)) for name, (text, *rows) in measured_once(file, settings, measure).items()}
    return {
        name: replace(pattern, rows=rows) if isinstance(pattern, Unstructured) else pattern
        for name, (pattern, rows) in found.items()
    }


def _first_token(planned: Plan, tokenizer: Any, console: Console) -> FirstToken:
    """Whether the first token stands before every window, decided once for calibration, recovery and measuring."""
    if not planned.predicts:
        return FirstToken(None, "published", "the model sees images" if planned.images else "it predicts no next token")
    trust = planned.recipe.model.trust_remote_code
    text = planned.recipe.calibration.model_dump()
    dense = partial(load_model, planned.dense, trust_remote_code=trust)
    found = first_token(planned.recipe.bos, tokenizer, lambda: dense()[0], lambda: beginning(text, "calibration"))
    if planned.recipe.bos == "auto" and "loss" in found.why:
        said = "before every window" if found.token is not None else "as published"
        console.print(f"first token: {said}; {found.why}", highlight=False)
    return found


def _kept(planned: Plan, reader: Any) -> Any:
    """What is written beside the weights: what reads for the pruned part; of a tower, for the whole model."""
    if not tower_name(planned.model):
        return reader
    return load_tokenizer(planned.folder, trust_remote_code=planned.recipe.model.trust_remote_code)


def _close(complete: dict[str, Any], output: Path, console: Console) -> None:
    console.print()
    console.print(closing_table(complete, str(output)))
    if "adapter" in complete.get("notes", {}):
        console.print(f"pruned is {BESIDE}", highlight=False)
    said = {sentence for sentences in complete["warnings"].values() for sentence in sentences}
    for sentence in sorted(said):
        count = sum(sentence in sentences for sentences in complete["warnings"].values())
        console.print(f"[yellow]warning[/] ({count} linears): {escape(sentence)}", highlight=False)
    for sentence in left_as_is(complete["skipped"].items()):
        console.print(sentence, highlight=False, markup=False)
    if complete["verified"] is not True:
        for failure in complete["verified"]:
            console.print(f"[bold red]verification failed[/]: {escape(failure)}", highlight=False)
        return
    for name, written in complete["exports"].items():
        console.print(said_of(name, written, output / f"model-{name}"), highlight=False, markup=False)
    console.print("\nLoad it:\n")
    console.print(loading_code(output / "model"), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nmanifest {complete['manifest']}", highlight=False, soft_wrap=True)
    language = str(complete["model"]["class"]).endswith("ForCausalLM")
    further = [f"open {output}/report.html"]
    further += [f"sparsekit bench {output}", f"sparsekit export {output} --to gguf"] if language else []
    further += [f"sparsekit verify {output}"]
    console.print("\nNext:\n\n  " + "\n  ".join(further[:3]), markup=False, highlight=False, soft_wrap=True)
