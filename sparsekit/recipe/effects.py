"""What the stages of a recipe do to the model, as each declares it: read from the declaration, never from names."""

from collections.abc import Mapping
from typing import Any, Literal

from sparsekit import registry
from sparsekit.contracts import Effect
from sparsekit.recipe.methods import Stage

GROUPS = {"solver": "solvers", "stage": "stages", "criterion": "criteria"}


def kind(stage: Stage) -> Literal["solver", "stage", "criterion"]:
    """Whether a stage is a layer-wise solver, a stage with a loop of its own, or a structural criterion."""
    name = registry.normal(stage.name)
    kinds: tuple[Literal["solver", "criterion"], ...] = ("solver", "criterion")
    for each in kinds:
        if name in map(registry.normal, registry.names(GROUPS[each])):
            return each
    return "stage"


def group_of(stage: Stage) -> str:
    """The entry-point group that a stage's name is found in."""
    return GROUPS[kind(stage)]


def options_of(group: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method by name: those given, and the defaults of the others."""
    known = registry.options(registry.load(group, name))
    return {option: p.default for option, p in known.items()} | {
        registry.normal(option): value for option, value in given.items()
    }


def effect_of(stage: Stage) -> Effect:
    """What a stage declares that it does to the model.

    Raises:
        ValueError: it declares nothing, so nothing that it does could be checked; or it cannot be imported.
    """
    group = group_of(stage)
    function = registry.load(group, stage.name)
    options = options_of(group, stage.name, stage.options)
    if group == "criteria":
        scoring = function.scoring  # type: ignore[attr-defined]
        return Effect(
            cuts=True,
            moves=True,
            start="dense",
            processes="many",
            gradients=scoring.gradients,
            reads=scoring.reads,
        )
    if group == "solvers":
        start: dict[str, Literal["dense", "any", "answer"]] = {"none": "dense", "optional": "any", "required": "answer"}
        grid = getattr(function, "grid", lambda _: None)(options)
        return Effect(
            prunes=True,
            moves=True,
            start=start[registry.start(function)],
            grid=grid,
            reads=("text", "images"),
            processes="many",
            walks=True,
        )
    effect = getattr(function, "effect", None)
    if effect is None:
        offer = registry.package(registry.find(group, stage.name))
        raise ValueError(
            f"`{stage.name}` of {offer} does not declare what it does to the model, so nothing it does could be "
            "checked; put `@declares(Effect(...))` of sparsekit.contracts above its function"
        )
    declared: Effect = effect(options) if callable(effect) else effect
    return declared
