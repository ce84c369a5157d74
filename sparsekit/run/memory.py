"""`sparsekit.prune`: a model that is in memory goes through the stages of a recipe, on the path of the command line."""

import copy as copying
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekit.data import Corpus, calibration_tokens, positions_of, sample
from sparsekit.measure import FirstToken, beginning, first_token
from sparsekit.model import as_linears, with_tower
from sparsekit.model.structure import Shape
from sparsekit.recipe import load_recipe
from sparsekit.run import result
from sparsekit.run.ahead import check_carried
from sparsekit.run.claim import check_output, claim_output, fingerprint_of
from sparsekit.run.measured import measured_patterns
from sparsekit.run.plan import IN_MEMORY, Plan, make_plan
from sparsekit.run.pruned import Pruned
from sparsekit.run.sequence import run_stages
from sparsekit.run.sources import from_memory
from sparsekit.system import Meter, hardware, session, versions
from sparsekit.walk import digests

Calibration = Mapping[str, Any] | Sequence[str] | Tensor | Any


def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    pattern: str | float | None = None,
    stages: Sequence[str | Mapping[str, Any]],
    calibration: Calibration,
    copy: bool = False,
    resume: str | Path | None = None,
    quiet: bool = True,
    **settings: Any,
) -> Pruned:
    """Prune a model of transformers that is in memory, in place.

        result = prune(model, tokenizer, pattern="2:4", stages=["wanda", {"fista": {}}], calibration=texts)
        result.save("pruned")

    model: is changed, on the CPU afterwards, and is `result.model`. copy: prune a copy of it instead, which takes as
        much memory again; it is also what stages that ask for the dense model (distillation) need
    tokenizer: needed where there is text to read: in calibration, or by stages that read more of it
    pattern, stages: as in a recipe (docs/recipes.md)
    calibration: token ids (sequences, length) or pixels (images, channels, height, width); a list of texts or a
        `datasets.Dataset` with a column `text`, of which 128 windows of 2048 tokens, or of the model's positions, are
        taken; or a section as in a recipe, such as {"source": "c4", "samples": 64, "length": 512}
    resume: a folder in which finished blocks are kept, so that a call that was killed goes on where it was left; None
        keeps them in a temporary folder
    quiet: say nothing on the way
    settings: other sections of a recipe: error_correction, allocation, memory, trainer, seed

    Raises:
        ValueError: settings, model, text and tokenizer do not fit each other; nothing was changed then. Or a stage did
            something else than it declares (StageError): then the model is what the stages before left.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"prune takes a model of transformers that is in memory, not a {type(model).__name__}")
    section, tokens = _section(calibration, model, tokenizer)
    given = {"model": "in memory", "stages": list(stages), "calibration": section, **settings}
    if refused := settings.keys() & {"evaluate", "output", "from", "model", "keep"}:
        raise ValueError(f"prune takes no {min(refused)}: measure by sparsekit.evaluate, save by result.save")
    if pattern is not None:
        given["pattern"] = pattern
    with session():
        recipe = load_recipe(given)
        dense = copying.deepcopy(model) if copy else None
        model = copying.deepcopy(model) if copy else model
        model.to("cpu").eval()
        with as_linears(model), with_tower(model, recipe.prune):
            source = from_memory(model, tokenizer, (lambda: copying.deepcopy(dense)) if dense is not None else None)
            planned = make_plan(recipe, (_without_weights(model), source))
            if tokens is not None:
                planned.resolved["calibration"] |= {"source": IN_MEMORY}
            tokens, first = _tokens(planned, model, tokenizer, tokens)
            _check_tokens(tokens, planned)
            check_carried(recipe, model, planned.blocks, tokens)
            before = digests(model)
            held = None if resume is not None else tempfile.TemporaryDirectory(prefix="sparsekit-")
            output = Path(resume) if resume is not None else Path(held.name)  # type: ignore[union-attr]
            if resume is not None:
                check_output(output, resume=True)
                claim_output(output, fingerprint_of(planned, tokens))
            console = Console(quiet=quiet)
            with Meter() as meter:
                if planned.postponed:
                    with meter.stage("allocate"):
                        found = measured_patterns(planned, model, tokens, output / "activations")
                        planned = replace(planned, patterns=found)
                outcome = run_stages(planned, model, tokens, output, meter, console, first.token)
            shape = Shape.of(model, outcome.cuts, changed=result.changed(outcome)) if outcome.cuts else None
            report = {
                "model": {"name": source.name, "class": type(model).__name__, "dtype": "auto"},
                "recipe": planned.resolved,
                "versions": versions(planned.packages()),
                "hardware": hardware(),
                "stages": meter.stages(),
                **result.facts(planned, outcome, shape),
                "bos": {"asked": recipe.bos, "used": first.used, "why": first.why},
                "evaluation": {},
                "verified": ["not verified yet"],
            }
            pruned = Pruned(planned, model, tokenizer, outcome, report, before, held)
            report["verified"] = pruned.verify() or True
            return pruned


def _without_weights(model: nn.Module) -> nn.Module:
    """The model's structure on the meta device, as it is in memory; no weight is copied."""
    tensors = [*model.parameters(), *model.buffers()]
    empty: dict[int, Any] = {}
    for tensor in tensors:
        bare = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copying.deepcopy(model, empty)


def _section(calibration: Calibration, model: Any, tokenizer: Any) -> tuple[dict[str, Any], Tensor | Corpus | None]:
    """The section `calibration` of a recipe, and the tokens or the text where they need no source."""
    if isinstance(calibration, Tensor):
        if calibration.is_floating_point() and calibration.dim() > 2:  # pixels or patches: who sees them is asked later
            return {"samples": len(calibration)}, calibration
        fits = calibration.dim() == 2 and calibration.shape[1] > 1 and len(calibration)
        if not fits or calibration.is_floating_point():
            raise ValueError(
                f"calibration is {calibration.dtype} {tuple(calibration.shape)}; give token ids (sequences, length), "
                "whole numbers, at least two a sequence"
            )
        samples, length = calibration.shape
        return {"samples": samples, "length": length}, calibration.long().cpu()
    if isinstance(calibration, Mapping):
        if tokenizer is None:
            raise ValueError("calibration names a source of text, which needs a tokenizer; give one, or token ids")
        return dict(calibration), None
    texts: Any = calibration if isinstance(calibration, list | tuple) else None
    if "text" in getattr(calibration, "column_names", ()):
        texts = calibration["text"]  # type: ignore[call-overload]
    if texts is None or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}; give token ids, a list of texts, a datasets.Dataset with "
            "a column `text`, or a section as in a recipe"
        )
    if tokenizer is None:
        raise ValueError("calibration is text, which needs a tokenizer; give one, or token ids")
    positions = positions_of(model.config)
    length = min(2048, positions or 2048)
    return {"samples": 128, "length": length}, Corpus(list(texts), name="the calibration text")


def _tokens(planned: Plan, model: Any, tokenizer: Any, given: Tensor | Corpus | None) -> tuple[Tensor, FirstToken]:
    """The calibration tokens (samples, length), and whether a first token stands before every window.

    given: tokens as they are, or text to cut; None: the recipe names a source
    """
    if isinstance(given, Tensor):
        return given, FirstToken(None, "published", "tokens were given")
    asked = planned.recipe.calibration.model_dump(exclude={"batch"})

    def text() -> str:
        return beginning(asked, "calibration") if given is None else given.separator.join(given.documents)

    first = first_token(planned.recipe.bos, tokenizer, lambda: model, text)
    if given is None:
        return calibration_tokens(asked, tokenizer, planned.positions, planned.config.vocab_size, first.token), first
    numbers = {key: asked[key] for key in ("samples", "length", "seed")}
    return sample(given, tokenizer, **numbers, first=first.token), first


def _check_tokens(tokens: Tensor, planned: Plan) -> None:
    if planned.images != tokens.is_floating_point():
        raise ValueError(f"the model {'sees images' if planned.images else 'reads text'}, and calibration is none")
    if planned.images:
        return
    if planned.positions is not None and tokens.shape[1] > planned.positions:
        raise ValueError(f"calibration has {tokens.shape[1]} tokens a sequence, the model {planned.positions} places")
    largest, embedded = int(tokens.max()), planned.config.vocab_size
    if largest >= embedded or int(tokens.min()) < 0:
        raise ValueError(f"calibration has token {largest}, but the model embeds {embedded}: they do not fit")
