"""The contract of a structural criterion, for the one-line test of anybody's."""

import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from sparsekit.contracts import Decision, Scoring, share
from sparsekit.model.structure import COUNTED, choose, find_units
from sparsekit.testing.contexts import context, kinds_in_one_model, tiny_experts, tiny_mamba, tiny_model, tiny_tokens
from sparsekit.walk import digests

MODELS = {"experts": tiny_experts, "mamba": tiny_mamba}  # others: tiny_model


def check_criterion(criterion: Callable[..., Any], *, remove: str | float = "30%", **options: Any) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `criterion` breaks.

    A criterion is a function `(context, units, *, remove, options...) -> scores (units,)`, or a Decision, with a
    docstring, all options but `remove` with defaults, and marked by `@scores(kinds...)`. For every set of kinds that it
    declares, its scores are finite, the same for the same model, and enough to remove what is asked; the model is bit
    for bit what it was, and no hook of its own is left.

    options: of the criterion, such as a small budget
    """
    scoring = getattr(criterion, "scoring", None)
    assert isinstance(scoring, Scoring), "it is not marked: put @sparsekit.contracts.scores(kinds...) above it"
    assert (inspect.getdoc(criterion) or "").strip(), "the criterion has no docstring"
    parameters = list(inspect.signature(criterion).parameters.values())
    assert len(parameters) >= 2, "the first two parameters are the context and the units"
    assert "remove" in {p.name for p in parameters[2:]}, "there is no keyword-only parameter remove"
    for parameter in parameters[2:]:
        assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} is not keyword-only"
        assert parameter.name == "remove" or parameter.default is not parameter.empty, (
            f"option {parameter.name} has no default"
        )
    for kinds in kinds_in_one_model(scoring.kinds):
        _check_kinds(criterion, kinds, scoring, share(remove), options)


def _check_kinds(
    criterion: Callable[..., Any], kinds: list[str], scoring: Scoring, remove: float, options: dict[str, Any]
) -> None:
    model = MODELS.get(kinds[0], tiny_model)()
    before, hooks = digests(model), _hooks(model)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            here = context(model, tiny_tokens(), f"{folder}/{number}", batch=2, index=1)
            units = find_units(model, here.blocks, kinds)
            answer = criterion(here, units, remove=remove, **options)
            found.append(answer if isinstance(answer, Decision) else Decision(answer))
    where = f"of {' and '.join(kinds)}"
    scores = found[0].scores
    assert isinstance(scores, torch.Tensor) and scores.shape == (len(units),), (
        f"{where}: scores are not ({len(units)},)"
    )
    assert scores.isfinite().all(), f"{where}: scores contain NaN or Inf"
    assert torch.equal(scores, found[1].scores), f"{where}: two calls on one model gave different scores"
    assert digests(model) == before, f"{where}: the criterion changed the model"
    assert _hooks(model) == hooks, f"{where}: hooks of the criterion are left in the model"
    shape = scoring.shape if set(COUNTED) & set(kinds) else "free"
    kept = found[0].kept
    if kept is None:
        budgets = scoring.budgets if shape == "free" else "separate"
        kept = choose(units, scores.cpu(), remove, shape=shape, budgets=budgets)
    assert kept.shape == (len(units),) and kept.dtype == torch.bool, f"{where}: kept is no mask of {len(units)} units"
    assert units.removed(kept) >= remove - 1e-6, f"{where}: less than {remove:.0%} would be removed"


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
