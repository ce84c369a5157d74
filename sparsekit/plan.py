"""What a recipe comes to on a given model, known before any weight is read: blocks, groups, patterns, estimates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit import plugins
from sparsekit.blocks import Block, discover
from sparsekit.checkpoint import locate, skeleton
from sparsekit.pattern import NM, Pattern, Unstructured, parse
from sparsekit.recipe import Recipe, RecipeError, check_options, kind, resolved
from sparsekit.report import Meter
from sparsekit.solvers.chain import chain

SAMPLE_LENGTH = 8  # tokens of the forward pass that looks for groups
BATCH_TOKENS = 256  # tokens that go through a block at once, unless the recipe says otherwise: enough for full speed


@dataclass
class Plan:
    """A checked recipe with the model's structure: everything but weights and text."""

    recipe: Recipe
    resolved: dict[str, Any]
    folder: Path  # of the source checkpoint
    model: nn.Module  # on the meta device
    blocks: list[Block]
    patterns: dict[str, Pattern]

    @property
    def batch(self) -> int:
        """Sequences that go through a block at once."""
        calibration = self.recipe.calibration
        return calibration.batch or max(1, BATCH_TOKENS // calibration.length)

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self.model.config.get_text_config()  # type: ignore[union-attr,operator]

    @property
    def positions(self) -> int | None:
        """The size of the model's position table."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the recipe's model computes."""
        accelerator = self.recipe.trainer.accelerator
        if accelerator in ("auto", "gpu"):
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device(accelerator)

    @property
    def skipped(self) -> dict[str, str]:
        """What is inside the blocks but left as it is, and why."""
        return {name: why for block in self.blocks for name, why in block.skipped.items()}

    def solver(self, meter: Meter) -> Callable[..., Tensor]:
        """The chain of the recipe's solvers, each one's time counted to its own name."""
        return chain(*(timed(stage.name, _configured(stage), meter) for stage in self.recipe.stages))

    def packages(self) -> tuple[str, ...]:
        """The distributions that the recipe's methods come from."""
        entries = [plugins.find("solvers", stage.name) for stage in self.recipe.stages]
        entries += [plugins.find("allocators", self.recipe.allocation.name)]
        entries += [plugins.find("sources", self.recipe.calibration.source)]
        return tuple(sorted({entry.distro.name for entry in entries if entry.distro is not None}))


def make(recipe: Recipe) -> Plan:
    """Check a recipe against the installed methods and its model's structure.

    Raises:
        RecipeError: options or order of stages are wrong; all problems at once.
        ValueError: there is no such model, or it cannot take the pattern.
    """
    problems = check_options(recipe)
    problems += [
        f"stage {index + 1}, `{stage.name}`, has a training loop of its own; this version runs layer-wise solvers only"
        for index, stage in enumerate(recipe.stages)
        if kind(stage) == "stage"
    ]
    devices = recipe.trainer.devices
    if devices != 1 and not (isinstance(devices, list) and len(devices) == 1):
        problems.append(f"`trainer.devices` is {devices}; this version walks on one device, give 1")
    if problems:
        raise RecipeError(problems)
    folder = locate(recipe.model.model_dump())
    model = skeleton(folder, trust_remote_code=recipe.model.trust_remote_code)
    model.to(torch.bfloat16)  # fused experts have a forward on the meta device in no other dtype
    blocks = discover(model, torch.zeros(1, SAMPLE_LENGTH, dtype=torch.long, device="meta"))
    return Plan(recipe, resolved(recipe), folder, model, blocks, allocate(recipe, blocks))


def allocate(recipe: Recipe, blocks: list[Block]) -> dict[str, Pattern]:
    """Every linear's pattern, by the recipe's allocation rule.

    Raises:
        ValueError: a pattern does not divide a layer's width, or the rule did not conserve the total.
    """
    pattern = parse(recipe.pattern)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    for name, linear in linears.items():
        pattern.check(linear.shape[1], name)
    if isinstance(pattern, NM):
        return dict.fromkeys(linears, pattern)
    rule = recipe.allocation
    counts = {name: linear.weight.numel() for name, linear in linears.items()}
    given = plugins.load("allocators", rule.name)(counts, pattern.sparsity, **_underscored(rule.options))
    if given.keys() != counts.keys() or not all(0 <= value < 1 for value in given.values()):
        raise ValueError(f"allocation `{rule.name}` must give every linear a sparsity from 0 to below 1")
    total = sum(given[name] * counts[name] for name in counts) / sum(counts.values())
    if abs(total - pattern.sparsity) > 1e-6:
        raise ValueError(f"allocation `{rule.name}` gives {total:.4%} in total, {pattern} was asked")
    return {name: Unstructured(value) for name, value in given.items()}


def timed(name: str, solver: Callable[..., Tensor], meter: Meter) -> Callable[..., Tensor]:
    """The same solver, its time and memory counted to `name`."""

    @wraps(solver)  # so that its signature, which says whether it takes a warm start, stays visible
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with meter.stage(name):
            return solver(*args, **kwargs)

    return run


def _configured(stage: Any) -> Callable[..., Tensor]:
    return partial(plugins.load("solvers", stage.name), **_underscored(stage.options))


def _underscored(options: dict[str, Any]) -> dict[str, Any]:
    return {plugins.normal(name): value for name, value in options.items()}
