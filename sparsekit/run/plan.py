"""What a recipe comes to on a given model, known before any weight is read: blocks, groups, patterns, estimates."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial, wraps
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit import registry
from sparsekit.maths import Pattern, Quantization, Unstructured, mixture, parse
from sparsekit.model import (
    Block,
    adopt,
    channels_of,
    discover,
    height_and_width,
    locate,
    patches,
    sees_images,
    skeleton,
    vision_config,
)
from sparsekit.recipe import Recipe, RecipeError, Stage, check_options, kind, resolved, walking
from sparsekit.system import Meter
from sparsekit.train import missing_loggers as missing
from sparsekit.walk import weights_and_norms

SAMPLE_LENGTH = 8  # tokens of the forward pass that looks for groups
BATCH_TOKENS = 256  # tokens that go through a block at once, unless the recipe says otherwise: enough for full speed


@dataclass
class Plan:
    """A checked recipe with the model's structure: everything but weights and text."""

    recipe: Recipe
    resolved: dict[str, Any]
    folder: Path  # of the checkpoint that it begins with
    dense: Path  # of the model that was never pruned; the same, unless the recipe goes on from a run
    model: nn.Module  # on the meta device
    blocks: list[Block]
    patterns: dict[str, Pattern]  # the same for all where `postponed`; none without a pattern

    @property
    def postponed(self) -> bool:
        """Whether the allocation rule looks at the dense model, so that `patterns` are not known without weights."""
        rule = registry.load("allocators", self.recipe.allocation.name)
        return bool(self.patterns) and "dense" in registry.asks(rule)

    @property
    def batch(self) -> int:
        """Sequences that go through a block at once."""
        return self.recipe.calibration.batch or max(1, BATCH_TOKENS // self.length)

    @property
    def length(self) -> int:
        """Tokens of a calibration sequence, or patches of an image."""
        return patches(self.model.config) if self.images else self.recipe.calibration.length

    @property
    def images(self) -> bool:
        """Whether the model is given images, and not text."""
        return sees_images(self.model)

    @property
    def config(self) -> Any:
        """The language model's configuration, or the image encoder's."""
        whole: Any = self.model.config
        return vision_config(whole) if self.images else whole.get_text_config()

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

    @property
    def segments(self) -> list[list[Stage]]:
        """The stages that run together: adjacent layer-wise solvers share one walk, any other stage runs alone."""
        stages = enumerate(self.recipe.stages)
        return [
            [stage for _, stage in segment]
            for _, segment in groupby(stages, lambda item: -1 if kind(item[1]) == "solver" else item[0])
        ]

    @property
    def quantization(self) -> Quantization | None:
        """How the weights of the result are quantized; None if the last stage leaves them as they are."""
        [(name, options)] = self.resolved["stages"][-1].items()
        return quantization_of(f"{kind(self.recipe.stages[-1])}s", name, options)

    def refit(self, model: nn.Module) -> None:
        """Follow a model out of which structures were cut: its blocks, and the patterns of its linears."""
        self.blocks = discover(model, sample_input(model))
        self.patterns = allocate(self.recipe, self.blocks)

    def packages(self) -> tuple[str, ...]:
        """The distributions that the recipe's methods come from."""
        entries = [registry.find(f"{kind(stage)}s", stage.name) for stage in self.recipe.stages]
        entries += [registry.find("allocators", self.recipe.allocation.name)]
        entries += [registry.find("sources", self.recipe.calibration.source)]
        return tuple(sorted({entry.distro.name for entry in entries if entry.distro is not None}))


def make_plan(recipe: Recipe) -> Plan:
    """Check a recipe against the installed methods and its model's structure.

    Raises:
        RecipeError: options or order of stages are wrong; all problems at once.
        ValueError: there is no such model, or it cannot take the pattern.
    """
    problems = check_options(recipe)
    devices = recipe.trainer.devices
    several = recipe.trainer.num_nodes > 1 or (
        len(devices) > 1 if isinstance(devices, list) else devices not in (1, "auto")
    )
    problems += [
        f"stage {index + 1}, `{stage.name}`, runs in one process: give 1 as trainer.devices and trainer.num_nodes"
        for index, stage in enumerate(recipe.stages)
        if several and walking(stage)
    ]
    problems += missing(recipe.loggers) + _off_grid(recipe) + _unmerged(recipe)
    if problems:
        raise RecipeError(problems)
    dense = locate(recipe.model.model_dump())
    folder = locate(recipe.from_) if recipe.from_ else dense
    model = skeleton(folder, trust_remote_code=recipe.model.trust_remote_code)
    model.to(torch.bfloat16)  # fused experts have a forward on the meta device in no other dtype
    if sees_images(model):
        _refuse_text(recipe, model)
    elif recipe.evaluate.accuracy:
        raise ValueError(
            f"{type(model).__name__} reads text, so evaluate.accuracy has nothing to measure; leave it out"
        )
    blocks = discover(model, sample_input(model))
    planned = Plan(recipe, resolved(recipe), folder, dense, model, blocks, allocate(recipe, blocks))
    if planned.quantization is not None:
        for block in blocks:
            for name, linear in block.linears.items():
                planned.quantization.columns(linear.shape[1], name)
    return planned


def _off_grid(recipe: Recipe) -> list[str]:
    """Stages that would move quantized weights off their grid."""
    problems, quantized = [], ""
    for index, stage in enumerate(recipe.stages):
        group = f"{kind(stage)}s"
        grid = quantization_of(group, stage.name, stage.options)
        if quantized and grid is None:
            problems.append(
                f"stage {index + 1}, `{stage.name}`, moves weights off the grid that `{quantized}` put them on: "
                "quantize last"
            )
        quantized = stage.name if grid is not None else quantized
    return problems


def _unmerged(recipe: Recipe) -> list[str]:
    """Updates beside a model that would be lost: of the run that this one begins with, of stages before the last."""
    problems = []
    if recipe.from_ and (Path(recipe.from_) / "adapter").is_dir():
        problems.append(
            f"`from: {recipe.from_}` keeps its update unmerged, in adapter/, and this run would begin without it: run "
            "that recovery with merge: true, or give the run that it went on from"
        )
    return problems + [
        f"stage {index + 1}, `{stage.name}`, has merge: false, but later stages would change the model that its update "
        "belongs to: merge it, or make it the last stage"
        for index, stage in enumerate(recipe.stages[:-1])
        if stage.options.get("merge") is False
    ]


def _refuse_text(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError for what a recipe of a vision model asks for and only language models have."""
    for index, stage in enumerate(recipe.stages):
        if kind(stage) == "stage" and not walking(stage):
            raise ValueError(
                f"stage {index + 1}, `{stage.name}`, is for language models, and {type(model).__name__} sees images: "
                "its weights are pruned by solvers, alone or in `lamp`"
            )
    for key in ("perplexity", "tasks"):
        if getattr(recipe.evaluate, key):
            raise ValueError(
                f"evaluate.{key} is for language models, and {type(model).__name__} sees images: give "
                "evaluate.accuracy, a folder of images with a folder for each class"
            )


def sample_input(model: Any) -> Tensor:
    """What the forward pass that looks for groups is given: tokens (1, few), or an image, on the model's device."""
    if not sees_images(model):
        return torch.zeros(1, SAMPLE_LENGTH, dtype=torch.long, device=model.device)
    size = height_and_width(vision_config(model.config).image_size)
    return torch.zeros(1, channels_of(model.config), *size, dtype=model.dtype, device=model.device)


def allocate(
    recipe: Recipe, blocks: list[Block], dense: Iterable[tuple[str, Tensor, Tensor]] | None = None
) -> dict[str, Pattern]:
    """Every linear's pattern, by the recipe's allocation rule.

    dense: name, weight (out, in) and norms of the inputs (in,) of every linear in the dense model, block after block;
        a rule that asks for them gives the same pattern to all where they are not there yet.

    Raises:
        ValueError: a pattern does not divide a layer's width, the rule refuses its options, or it did not conserve the
            total.
    """
    if recipe.pattern is None:
        return {}
    pattern = parse(recipe.pattern)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    for name, linear in linears.items():
        pattern.check(linear.shape[1], name)
    rule = recipe.allocation
    function = registry.load("allocators", rule.name)
    beside = {"groups": [block.groups for block in blocks], "dense": dense}
    asked = {name: beside[name] for name in registry.asks(function)}
    if "dense" in asked and dense is None:
        return dict.fromkeys(linears, pattern)
    counts = {name: linear.weight.numel() for name, linear in linears.items()}
    given = function(counts, pattern.sparsity, **asked, **_underscored(rule.options))
    if given.keys() != counts.keys() or not all(0 <= value < 1 for value in given.values()):
        raise ValueError(f"allocation `{rule.name}` must give every linear a sparsity from 0 to below 1")
    total = sum(given[name] * counts[name] for name in counts) / sum(counts.values())
    if abs(total - pattern.sparsity) > 1e-6:
        raise ValueError(f"allocation `{rule.name}` gives {total:.4%} in total, {pattern} was asked")
    if isinstance(pattern, Unstructured):
        return {name: Unstructured(given[name]) for name in counts}
    mixed = mixture(given, counts, pattern, [list(block.linears) for block in blocks])
    if len(set(given.values())) > 1 and set(mixed.values()) == {pattern}:
        warnings.warn(
            f"allocation `{rule.name}` gives sparsities from {min(given.values()):.1%} to {max(given.values()):.1%}, "
            f"which all round to {pattern}: it changes nothing; widen it by its options, or take larger groups",
            stacklevel=2,
        )
    return dict(mixed)


def measured_patterns(planned: Plan, model: nn.Module, tokens: Tensor, folder: Path) -> dict[str, Pattern]:
    """The patterns by a rule that looks at the dense model: one pass of `tokens` (sequences, length) through it.

    folder: for activations beyond the recipe's budget.
    """
    dense = weights_and_norms(
        model,
        adopt(model, planned.blocks),
        tokens,
        batch=planned.batch,
        budget=planned.recipe.memory.activations,
        folder=folder,
        device=planned.device,
    )
    return allocate(planned.recipe, planned.blocks, dense)


def timed(name: str, solver: Callable[..., Tensor], meter: Meter) -> Callable[..., Tensor]:
    """The same solver, its time and memory counted to `name`."""

    @wraps(solver)  # so that its signature, which says whether it takes a warm start, stays visible
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with meter.stage(name):
            return solver(*args, **kwargs)

    return run


def configured(group: str, stage: Stage) -> Callable[..., Any]:
    """The function that a stage names, with its options filled in."""
    return partial(registry.load(group, stage.name), **_underscored(stage.options))


def quantization_of(group: str, name: str, options: Any) -> Quantization | None:
    """What a method's options say: `bits` and the like, a mapping `quantize` of them, or those of its last solver."""
    defaults = {option: p.default for option, p in registry.options(registry.load(group, name)).items()}
    filled = defaults | (options or {})
    settings = filled.get("quantize") or filled
    if "bits" in settings:
        keys = [field.name for field in fields(Quantization)]
        return Quantization.of({key: settings[key] for key in keys if key in settings})
    if "solver" not in filled:
        return None
    last = filled["solver"][-1] if isinstance(filled["solver"], list) else filled["solver"]
    [(inner, given)] = last.items() if isinstance(last, dict) else [(last, {})]
    return quantization_of("solvers", inner, given)


def _underscored(options: dict[str, Any]) -> dict[str, Any]:
    return {registry.normal(name): value for name, value in options.items()}
