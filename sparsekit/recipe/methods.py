"""Methods as a recipe names them: a bare name, or one name over its options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsekit import registry
from sparsekit.contracts import show
from sparsekit.recipe.yaml_tree import Keys, dotted


@dataclass(frozen=True)
class Stage:
    """A named method with its options: an element of `stages`, or `allocation`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)  # in the recipe's file; None if set from outside


def expand(keys: Keys, value: Any, inner: str | int = "") -> Any:
    """A short form written in full: `model: x` -> `model: {path: x}`, a bare method -> `{method: {}}`.

    inner: the key that an override goes on to; ValueError if it is another method than the one that is there.
    """
    match keys:
        case ("allocation",) | ("stages", _):
            full = {registry.normal(value): {}} if isinstance(value, str) else value
            if isinstance(full, dict) and full and inner not in full:
                key = dotted(keys)
                raise ValueError(
                    f"`{key}` is `{next(iter(full))}`, not `{inner}`; to replace it give {key}={inner} first"
                )
            return full
        case ("model",) if isinstance(value, str):
            return {"path": value}
        case ("evaluate", "perplexity", _) if isinstance(value, str):
            return {"source": value}
        case ("evaluate", "accuracy" | "features" | "iou", _) if isinstance(value, str):
            return {"path": value}
    return value


def method(*groups: str) -> Callable[[Any], Stage]:
    """A validator: a bare name, or one name over its options, of a method in one of these groups."""

    def parse(value: Any) -> Stage:
        if isinstance(value, Stage):
            return value
        given = {value: {}} if isinstance(value, str) else value
        if not isinstance(given, dict) or len(given) != 1:
            raise ValueError(
                f"is {show(value)}, must be a name, or one name with its options: `name: {{option: value}}`"
            )
        [(name, options)] = given.items()
        if not isinstance(options, dict | None):
            raise ValueError(f"`{name}` has {show(options)}, must have a mapping of options, such as {{option: value}}")
        return Stage(_find(name, groups), options or {})

    return parse


def _find(name: str, groups: Sequence[str]) -> str:
    """The published spelling of an installed name."""
    offering = [g for g in groups if registry.normal(name) in map(registry.normal, registry.names(g))]
    if len(offering) > 1:
        offers = " and ".join(f"a {g[:-1]} of {registry.package(registry.find(g, name))}" for g in offering)
        raise ValueError(f"`{name}` is {offers}: uninstall one of them")
    if not offering and len(groups) > 1:
        valid = [each for group in groups for each in registry.names(group)]
        raise registry.UnknownName(f"unknown method `{name}`, {registry.suggest(name, valid)}")
    return registry.find((offering or groups)[0], name).name


def source_name(name: str) -> str:
    """The published spelling of an installed source of text."""
    return _find(name, ["sources"])
