"""Every linear's pattern, by the recipe's allocation rule."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit import registry
from sparsekit.maths import Allocation, Pattern, Unstructured, mixture, parse, row_factors
from sparsekit.model import Block, hears, meant, sample_image, sample_sound, sees_images
from sparsekit.recipe import Recipe, effect_of
from sparsekit.run.methods import underscored

DENSE = ("dense", "curvature")  # what rules may ask to see of the dense model, see docs/plugins.md
SAMPLE_LENGTH = 8  # tokens of the forward pass that looks for groups


def sample_input(model: Any) -> Tensor:
    """What the forward pass that looks for groups is given, on the model's device: tokens, an image, or silence."""
    if sees_images(model):
        return sample_image(model)
    if hears(model):
        return sample_sound(model)
    return torch.zeros(1, SAMPLE_LENGTH, dtype=torch.long, device=model.device)


def pattern_of(recipe: Recipe, block: Block, name: str) -> str:
    """What the recipe's `pattern` says of a linear: of several keys that mean it, the first."""
    if not isinstance(recipe.pattern, dict):
        return str(recipe.pattern)
    return next(text for key, text in recipe.pattern.items() if meant(block, name, key))


def postponed(recipe: Recipe) -> str:
    """What the recipe's rule asks of the dense model, one of `DENSE`; empty: nothing."""
    asked = registry.asks(registry.load("allocators", recipe.allocation.name))
    return next((name for name in DENSE if name in asked), "")


def allocate(
    recipe: Recipe, blocks: list[Block], seen: Mapping[str, Iterable[Any]] | None = None
) -> dict[str, Pattern]:
    """Every linear's pattern, by the recipe's allocation rule.

    seen: what was seen of the dense model, by the name under which a rule asks for it (`DENSE`); such a rule gives the
        same pattern to all where it is not there yet.

    Raises:
        ValueError: a pattern does not divide a layer's width, the rule refuses its options, or it did not conserve the
            total.
    """
    if recipe.pattern is None:
        return {}
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    asked_for = {name: parse(pattern_of(recipe, block, name)) for block in blocks for name in block.linears}
    for name, linear in linears.items():
        asked_for[name].check(linear.shape[1], name)
    if isinstance(recipe.pattern, dict):
        return asked_for
    pattern, rule = parse(recipe.pattern), recipe.allocation
    function = registry.load("allocators", rule.name)
    if postponed(recipe) and not seen:
        return dict.fromkeys(linears, pattern)
    beside = {"groups": [block.groups for block in blocks]} | dict(seen or {})
    asked = {name: beside[name] for name in registry.asks(function)}
    counts = {name: linear.weight.numel() for name, linear in linears.items()}
    told = function(counts, pattern.sparsity, **asked, **underscored(rule.options))
    given, rows = told if isinstance(told, Allocation) else Allocation(told, {})
    for name, importance in rows.items():
        if name not in linears or importance.shape != (linears[name].shape[0],) or not (importance >= 0).all():
            raise ValueError(
                f"allocation `{rule.name}` says what the rows of {name} count: it must be a linear of the model, with "
                "one number for each of its outputs, at least 0"
            )
    if any(effect_of(stage).grid is not None for stage in recipe.stages):
        rows = {}  # a row's grid of numbers is its own
    if given.keys() != counts.keys() or not all(0 <= value < 1 for value in given.values()):
        raise ValueError(f"allocation `{rule.name}` must give every linear a sparsity from 0 to below 1")
    total = sum(given[name] * counts[name] for name in counts) / sum(counts.values())
    if abs(total - pattern.sparsity) > 1e-6:
        raise ValueError(f"allocation `{rule.name}` gives {total:.4%} in total, {pattern} was asked")
    if isinstance(pattern, Unstructured):
        each = {name: row_factors(importance) for name, importance in rows.items()}
        return {name: Unstructured(given[name], each.get(name, ())) for name in counts}
    mixed = mixture(given, counts, pattern, [list(block.linears) for block in blocks])
    if len(set(given.values())) > 1 and set(mixed.values()) == {pattern}:
        warnings.warn(
            f"allocation `{rule.name}` gives sparsities from {min(given.values()):.1%} to {max(given.values()):.1%}, "
            f"which all round to {pattern}: it changes nothing; widen it by its options, or take larger groups",
            stacklevel=2,
        )
    return dict(mixed)
