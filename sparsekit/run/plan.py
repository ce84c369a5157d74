"""What a recipe comes to on a given model, known before any weight is read: blocks, groups, patterns, estimates."""

import os
import shutil
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit import registry
from sparsekit.data import SQUARE, positions_of
from sparsekit.maths import Pattern, Quantization
from sparsekit.model import (
    Block,
    Tensors,
    choose_tower,
    described,
    discover,
    hears,
    locate,
    opened,
    patches,
    predicts_text,
    read_json,
    same_tower,
    sees_images,
    skeleton,
)
from sparsekit.recipe import Recipe, RecipeError, Stage, check_options, effect_of, group_of, kind, resolved
from sparsekit.run.ahead import check_cuts, check_reading
from sparsekit.run.allocation import allocate, postponed, sample_input
from sparsekit.run.needs import Needs, memory_needs, wholly, within
from sparsekit.run.selection import found_blocks
from sparsekit.run.sources import Source, from_folder
from sparsekit.system import human_size
from sparsekit.train import check_divisible, missing_loggers

IN_MEMORY = "in memory"  # what came from there has no folder and no source
BATCH_TOKENS = 256  # tokens that go through a block at once, unless the recipe says otherwise: enough for full speed


@dataclass(frozen=True)
class Plan:
    """A checked recipe with the model's structure: everything but weights and text."""

    recipe: Recipe
    resolved: dict[str, Any]
    folder: Path  # of the checkpoint that it begins with
    dense: Path  # of the model that was never pruned; the same, unless the recipe goes on from a run
    model: nn.Module  # on the meta device
    blocks: list[Block]
    patterns: dict[str, Pattern]  # the same for all where `postponed`; none without a pattern
    source: Source  # of weights and tokenizer

    @property
    def postponed(self) -> str:
        """What the allocation rule asks of the dense model, so that `patterns` are not known without weights."""
        return postponed(self.recipe) if self.patterns else ""

    @property
    def batch(self) -> int:
        """Sequences that go through a block at once."""
        return self.recipe.calibration.batch or max(1, BATCH_TOKENS // self.length)

    @property
    def calibration(self) -> dict[str, Any]:
        """The settings of the calibration text, for stages that read more of it; empty where it came as it is."""
        given = self.resolved["calibration"]["source"] == IN_MEMORY
        return {} if given else self.recipe.calibration.model_dump()

    @property
    def length(self) -> int:
        """Tokens of a calibration sequence, or patches of an image."""
        if not self.images:  # of sound there are as many places as of a text, by order of magnitude
            return self.recipe.calibration.length
        return patches(self.model, self.recipe.calibration.model_dump().get("side", SQUARE))

    @property
    def predicts(self) -> bool:
        """Whether the model predicts text, so that it can be asked to."""
        return predicts_text(self.model)

    @property
    def images(self) -> bool:
        """Whether the model is given images, and not text."""
        return sees_images(self.model)

    @property
    def hears(self) -> bool:
        """Whether the model is given sound, and not text alone."""
        return hears(self.model)

    @property
    def config(self) -> Any:
        """The language model's configuration, or the image encoder's."""
        return described(self.model)

    @property
    def positions(self) -> int | None:
        """The size of the model's position table."""
        return positions_of(self.config)

    @property
    def device(self) -> torch.device:
        """Where the recipe's model computes."""
        accelerator = self.recipe.trainer.accelerator
        if accelerator in ("auto", "gpu"):
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device(accelerator)

    @property
    def segments(self) -> list[list[Stage]]:
        """The stages that run together: adjacent layer-wise solvers share one walk, any other stage runs alone."""
        stages = enumerate(self.recipe.stages)
        return [
            [stage for _, stage in segment]
            for _, segment in groupby(stages, lambda item: -1 if kind(item[1]) == "solver" else item[0])
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory and on disk."""
        return _dtype(self.recipe, self.config)

    @property
    def needs(self) -> dict[str, Needs]:
        """What each stage holds in memory beside activations."""
        return memory_needs(self.recipe, self.segments, self.blocks, self.dtype)

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of activations, and of Gram matrices at a time, in memory. ValueError: see `needs.within`."""
        return within(self.recipe, self.segments, self.blocks, self.dtype)

    @property
    def quantization(self) -> Quantization | None:
        """How the weights of the result are quantized; None if the last stage leaves them as they are."""
        return effect_of(self.recipe.stages[-1]).grid

    def packages(self) -> tuple[str, ...]:
        """The distributions that the recipe's methods come from."""
        entries = [registry.find(group_of(stage), stage.name) for stage in self.recipe.stages]
        entries += [registry.find("allocators", self.recipe.allocation.name)]
        entries += [registry.find("sources", self.recipe.calibration.source)]
        return tuple(sorted({entry.distro.name for entry in entries if entry.distro is not None}))


def _dtype(recipe: Recipe, config: Any) -> torch.dtype:
    given = recipe.model.dtype
    found: torch.dtype = (config.dtype or torch.float32) if given == "auto" else getattr(torch, given)
    return found


def make_plan(recipe: Recipe, memory: tuple[nn.Module, Source] | None = None) -> Plan:
    """Check a recipe against the installed methods and its model's structure.

    memory: the model itself where it is in memory, and what it came with; None: the recipe names a checkpoint

    Raises:
        RecipeError: options or order of stages are wrong; all problems at once.
        ValueError: there is no such model, or it cannot take the pattern.
    """
    problems = check_options(recipe)
    problems += _machine(recipe) + _nodes(recipe) + missing_loggers(recipe.loggers) + _unmerged(recipe)
    problems = problems or _alone(recipe) or _undivided(recipe)
    if problems:
        raise RecipeError(problems)
    dense = folder = Path(IN_MEMORY)  # there is no such folder
    if memory is not None:
        model, source = memory
    else:
        dense = locate(recipe.model.model_dump())
        folder = locate(recipe.from_) if recipe.from_ else dense
        _refuse_quantized(folder)
        stored = opened(folder, trust_remote_code=recipe.model.trust_remote_code)
        _account(stored)
        model = stored.model
        model.to(torch.bfloat16)  # fused experts have a forward on the meta device in no other dtype
        choose_tower(model, recipe.prune)
        trust = recipe.model.trust_remote_code
        source = from_folder(folder, dense, model, trust_remote_code=trust)
    check_reading(recipe, model)
    blocks = found_blocks(recipe, model)
    if recipe.trainer.strategy == "fsdp":
        check_divisible(blocks)
    check_cuts(recipe, model, blocks, _dtype(recipe, model.config))
    planned = Plan(recipe, resolved(recipe), folder, dense, model, blocks, allocate(recipe, blocks), source)
    if planned.quantization is not None:
        for block in blocks:
            for name, linear in block.linears.items():
                planned.quantization.columns(linear.shape[1], name)
    _check_budget(planned, in_memory=memory is not None)
    if memory is None:
        _check_room(planned, recipe.output)
    return planned


def blocks_in(folder: Path, like: nn.Module, *, trust_remote_code: bool = False) -> list[Block]:
    """The blocks of the model in a folder, all linears among them, in the tower chosen of `like`; no weight is read."""
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    same_tower(model, like)
    model.to(torch.bfloat16)
    return discover(model, sample_input(model))


def _refuse_quantized(folder: Path) -> None:
    """Raise ValueError for weights that are stored in a quantized form."""
    told = read_json(folder / "config.json").get("quantization_config")
    if told:
        how = told.get("quant_method", "quantized") if isinstance(told, dict) else "quantized"
        raise ValueError(
            f"{folder} stores its weights quantized ({how}), and sparsekit prunes plain ones: load it by transformers, "
            "call model.dequantize() and save_pretrained, and give the folder of the result"
        )


def _account(stored: Tensors) -> None:
    """Every tensor of the source is loaded, or said not to be.

    Raises:
        ValueError: the model that would be pruned is only a part of the checkpoint, or lacks tensors.
    """
    folder, name = stored.stored.folder, type(stored.model).__name__
    if stored.unused:
        raise ValueError(
            f"{folder} holds {len(stored.unused)} tensors that {name} has no place for, the first is "
            f"{stored.unused[0]}: they would be lost, so this model cannot be pruned yet"
        )
    if stored.missing:
        raise ValueError(f"{folder} lacks {len(stored.missing)} tensors of {name}, the first is {stored.missing[0]}")
    if stored.ignored:
        warnings.warn(
            f"{len(stored.ignored)} tensors of {folder}, the first is {stored.ignored[0]}, are left out by {name} of "
            "transformers itself, and so by the result",
            stacklevel=3,
        )
    if unread := stored.stored.unread:
        warnings.warn(
            f"{folder} also holds {', '.join(unread[:3])}{' and others' * (len(unread) > 3)}, which transformers does "
            "not read: neither is it pruned",
            stacklevel=3,
        )


def _machine(recipe: Recipe) -> list[str]:
    """What the recipe asks of the machine and is not there."""
    asked, there = recipe.trainer.accelerator, torch.accelerator.current_accelerator()
    known = {"auto", "cpu"} | ({"gpu", there.type} if there else set())
    if asked in known:
        if recipe.trainer.precision == "16-mixed" and (asked == "cpu" or there is None):
            return ["trainer.precision is 16-mixed, which a CPU does not have: give bf16-mixed or 32-true"]
        return []
    found = f"the cpu and {there.type}" if there else "the cpu alone"
    return [f"trainer.accelerator is {asked}, and this machine has {found}: give {', '.join(sorted(known))}"]


def _nodes(recipe: Recipe) -> list[str]:
    """Machines that nobody started: the first process would wait for the others for ever."""
    nodes = recipe.trainer.num_nodes
    if nodes == 1 or {"MASTER_ADDR", "WORLD_SIZE"} <= os.environ.keys():
        return []
    return [
        f"trainer.num_nodes is {nodes}, and this process was not started by torchrun: start it on every machine by "
        f"torchrun --nnodes {nodes} ..., or give 1"
    ]


def _check_budget(planned: Plan, *, in_memory: bool) -> None:
    """Raise ValueError for a budget that cannot be kept; say for which stages it is not held."""
    if planned.recipe.memory.budget is None:
        return
    if in_memory:
        raise ValueError(
            "memory.budget is for models that are read from disk block by block, and this one is in memory: give "
            "memory.activations, or the model's folder"
        )
    _ = planned.memory
    if others := wholly(planned.segments):
        warnings.warn(
            f"memory.budget is kept by walks; {', '.join(others)} is given the model as a whole and not held to it",
            stacklevel=3,
        )


def _check_room(planned: Plan, output: str | None) -> None:
    """Raise ValueError for calibration activations that neither memory nor disk can hold."""
    recipe, config = planned.recipe, planned.config
    hidden = getattr(config, "hidden_size", 0) or 0
    tokens = recipe.calibration.samples * planned.length
    wanted = tokens * hidden * (2 if config.dtype in (torch.bfloat16, torch.float16) else 4)
    folder = Path(output or ".").absolute()
    while not folder.exists():
        folder = folder.parent
    room = planned.memory[0] + shutil.disk_usage(folder).free
    if wanted > room:
        raise ValueError(
            f"calibration of {recipe.calibration.samples:,} x {planned.length:,} tokens has {human_size(wanted)} of "
            f"activations, and there is room for {human_size(room)} (memory.activations and the disk of {folder}): "
            "give fewer samples, or a shorter length"
        )


def _alone(recipe: Recipe) -> list[str]:
    """Stages that cannot share their work with other processes, where there are to be some."""
    return [
        f"stage {index + 1}, `{stage.name}`, runs in one process: give 1 as trainer.devices and trainer.num_nodes"
        for index, stage in enumerate(recipe.stages)
        if recipe.trainer.several and effect_of(stage).processes == "one"
    ]


def _undivided(recipe: Recipe) -> list[str]:
    """A strategy that divides what is trained, where there is nothing, or nobody, to divide it among."""
    if recipe.trainer.strategy != "fsdp":
        return []
    if not recipe.trainer.several:
        return ["trainer.strategy is fsdp, which divides a model among processes: give 2 or more as trainer.devices"]
    if not any(effect_of(stage).divides for stage in recipe.stages):
        return ["trainer.strategy is fsdp, which is for lora and finetune, and no stage is one: leave it out"]
    return []


def _unmerged(recipe: Recipe) -> list[str]:
    """An update beside the model that this run begins with, which would be lost."""
    if recipe.from_ and (Path(recipe.from_) / "adapter").is_dir():
        return [
            f"`from: {recipe.from_}` keeps its update unmerged, in adapter/, and this run would begin without it: run "
            "that recovery with merge: true, or give the run that it went on from"
        ]
    return []
