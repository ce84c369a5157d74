"""What can be said before any weight is read: whether a model can be asked this, and what structural stages leave."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit import registry
from sparsekit.contracts import goal, share
from sparsekit.maths import NM, parse
from sparsekit.measure import makes_masks
from sparsekit.model import (
    Block,
    adopt,
    described,
    discover,
    hears,
    in_two_parts,
    perceives,
    predicts_text,
    sees_images,
    tower_name,
    unreadable,
)
from sparsekit.model.structure import Removal, Shape, choose, find_units, kinds_of
from sparsekit.recipe import Recipe, Stage, effect_of, kind, options_of
from sparsekit.run.allocation import pattern_of, postponed, sample_input
from sparsekit.run.context import Context
from sparsekit.run.goals import counted
from sparsekit.run.selection import found_blocks
from sparsekit.walk import check_walk


def check_reading(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError for what cannot be asked of a model that reads what this one reads."""
    if why := unreadable(model):
        raise ValueError(f"{type(model).__name__} {why}: sparsekit cannot walk through it yet, so it is not pruned")
    if perceives(model) or not predicts_text(model):
        _refuse_text(recipe, model)
    for index, stage in enumerate(recipe.stages):
        classifies = "ForImageClassification" in type(model).__name__ and not tower_name(model)
        if effect_of(stage).reads == ("images",) and not classifies:
            raise ValueError(
                f"stage {index + 1}, `{stage.name}`, learns the classes of images with labels, and "
                f"{type(model).__name__} tells none: leave `labels` out"
            )
    if in_two_parts(model):
        _refuse_dense_streams(recipe, model)
    if tower_name(model):
        _refuse_whole(recipe, model)
    if postponed(recipe) == "curvature" and (sees_images(model) or not predicts_text(model)):
        raise ValueError(
            f"allocation by {recipe.allocation.name} follows the loss of the next token, and {type(model).__name__} "
            "predicts none: give owl, which looks at weights and inputs alone, or uniform"
        )
    if recipe.evaluate.iou and not makes_masks(model):
        raise ValueError(
            f"{type(model).__name__} cuts no objects out, so evaluate.iou has nothing to measure; leave it out"
        )
    for key in ("accuracy", "features"):
        if getattr(recipe.evaluate, key) and not sees_images(model):
            raise ValueError(
                f"{type(model).__name__} sees no images, so evaluate.{key} has nothing to measure; leave it out"
            )


def _refuse_text(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError for what a recipe asks of a model that predicts no text, and only models have that do."""
    name = type(model).__name__
    what = "sees images" if sees_images(model) else "hears" if hears(model) else "predicts no next token"
    able = [each for each in registry.names("criteria") if "images" in effect_of(Stage(each)).reads]
    structures = f", its structures by {', '.join([*able, 'policy_gradient'])}" if sees_images(model) else ""
    for index, stage in enumerate(recipe.stages):
        effect = effect_of(stage)
        # what goes through one block after another needs no loss of a text, whatever the model predicts
        if "images" not in effect.reads or not (sees_images(model) or effect.walks):
            if sees_images(model) and "images" in effect_of(Stage(stage.name)).reads:  # with other options
                raise ValueError(
                    f"stage {index + 1}, `{stage.name}`, reads text alone with {', '.join(stage.options)}, and {name} "
                    "sees images: leave out what is of text"
                )
            raise ValueError(
                f"stage {index + 1}, `{stage.name}`, is for causal language models, and {name} {what}: its weights are "
                f"pruned by solvers, alone or in `lamp`{structures}"
            )
    for key in ("perplexity", "tasks"):
        if getattr(recipe.evaluate, key):
            instead = (
                "give evaluate.accuracy, a folder of images with a folder for each class, or iou, images with masks"
                if sees_images(model)
                else "leave it out, and measure by evaluate.metrics"
            )
            raise ValueError(f"evaluate.{key} is for causal language models, and {name} {what}: {instead}")


def _refuse_whole(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError for what a recipe asks of a whole model, and one tower of it is pruned."""
    name = f"{tower_name(model)} of {type(model).__name__}"
    for index, stage in enumerate(recipe.stages):
        effect = effect_of(stage)
        if effect.cuts or effect.resizes:
            raise ValueError(
                f"stage {index + 1}, `{stage.name}`, changes the model's shape, which its config cannot say of {name} "
                "alone: prune the tower's weights by solvers or `lamp`"
            )
    for key in ("accuracy", "iou"):
        if getattr(recipe.evaluate, key):
            raise ValueError(f"evaluate.{key} is of whole models, and {name} is pruned: measure evaluate.features")


def _refuse_dense_streams(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError for what needs the dense model beside the pruned one, where a decoder reads a pruned encoder."""
    told = f"{type(model).__name__} has an encoder, and a decoder that reads what the pruned encoder gives"
    if recipe.error_correction not in ("prefix", "sequential"):
        raise ValueError(f"{told}: error_correction {recipe.error_correction} is not for it, give prefix or sequential")
    for index, stage in enumerate(recipe.stages):
        if effect_of(stage).gradients:
            raise ValueError(
                f"{told}: stage {index + 1}, `{stage.name}`, needs the dense outputs, so give solvers, or sparsellm"
            )
    if postponed(recipe):
        raise ValueError(f"{told}: allocation by {recipe.allocation.name} needs the dense model, give uniform")


def check_cuts(recipe: Recipe, model: nn.Module, blocks: list[Block], dtype: torch.dtype) -> None:
    """Cut a copy of the model, on the meta device, as the recipe's structural stages will.

    Where every block loses as many units, the shape is known without scores. Where it is free (`shape: free`), an n:m
    pattern that comes later must divide whatever number is left.

    Raises:
        ValueError: a stage removes units that the model does not have, or more than they hold, or leaves widths that
            the pattern of a later stage does not divide.
    """
    stages = recipe.stages
    if not any(effect_of(stage).cuts for stage in stages):
        return
    if recipe.pattern is not None and postponed(recipe):
        raise ValueError(
            f"allocation by {recipe.allocation.name} looks at the model as it begins, and a stage cuts it before "
            "weights are pruned: cut in a run of its own, and go on `from:` it, or give another allocation"
        )
    if any(block.convolutions for block in blocks):
        raise ValueError(
            "targets name convolutions, and structures are cut of attention and MLPs: prune convolutions in a run "
            "of their own, `from:` the run that cuts"
        )
    if len({block.name.rpartition(".")[0] for block in blocks}) > 1 or any(block.scale for block in blocks):
        raise ValueError(
            f"{type(model).__name__} has stages of different widths, and structures are removed from models whose "
            "layers are alike: prune its weights instead"
        )
    asked = recipe.pattern.values() if isinstance(recipe.pattern, dict) else [recipe.pattern or 0]
    groups = [pattern for pattern in map(parse, asked) if isinstance(pattern, NM)]
    model, planned = copy.deepcopy(model), blocks
    blocks = adopt(model, blocks)
    cut = False
    for index, stage in enumerate(stages):
        options = removing_of(stage)
        if options is None:
            continue
        kinds, given, shape = options
        aim = goal(given)
        remove = share(given) if aim is None else counted(aim, model, blocks, dtype)
        if kinds == ["layers"] and not cut:
            _fix_layers(model, blocks)
            for block, known in zip(blocks, planned, strict=True):
                known.fixed = block.fixed
        units = find_units(model, blocks, kinds)
        mask = choose(units, torch.zeros(len(units)), remove, shape=shape)
        for each in kinds if not cut and kinds != ["layers"] else ():
            try_without(model, blocks, each)
        if not cut:  # of a model that is cut already, what was there before is not known here
            _check_stored(model, blocks, Removal(units.kinds, mask))
        cut = True
        later = next((each for each in stages[index + 1 :] if effect_of(each).prunes), None)
        before = f"stage {index + 1}, `{stage.name}`"
        if shape != "uniform" and kinds != ["layers"]:
            narrow = shape == "free" and [
                part for part in units.parts if part.output and part.columns.shape[1:].numel() == 1
            ]
            if groups and later and narrow:
                raise ValueError(
                    f"{before}, leaves any number of {narrow[0].kind} in a block, which the groups of "
                    f"{groups[0].group} of `{later.name}` need not divide: give it `shape: uniform`, or prune to a "
                    "share such as 50%"
                )
            return  # what is left is not known
        Removal(units.kinds, mask, {}, torch.zeros(len(units)), {}).apply(model, blocks)
        blocks = found_blocks(recipe, model)
        for block in blocks if recipe.pattern is not None and later else ():
            for name, linear in block.linears.items():
                try:
                    parse(pattern_of(recipe, block, name)).check(linear.shape[1], name)
                except ValueError as error:
                    raise ValueError(f"after {before}: {error}") from error


def _fix_layers(model: nn.Module, blocks: list[Block]) -> None:
    """Where layers of several kinds stand in one model, say of each kind whether layers of it can be dropped.

    Some cannot: a config that has attention in every eighth layer, or full attention in the last one always, cannot
    say that one of them is gone. The first and the last of each kind are tried, and all where these cannot go.
    """
    kinds: dict[Any, list[Block]] = {}
    types = getattr(described(model), "layer_types", None) or ()
    for block in blocks:
        shapes = tuple((name, parameter.shape) for name, parameter in block.module.named_parameters())
        kinds.setdefault((shapes, types[block.index] if len(types) == len(blocks) else ""), []).append(block)
    if len(kinds) == 1:
        return
    fixed: list[Block] = []
    for alike in kinds.values():
        ends = {alike[0].index: alike[0], alike[-1].index: alike[-1]}
        if not all(_runs_without(model, blocks, block) for block in ends.values()):
            fixed += [block for block in alike if not _runs_without(model, blocks, block)]
    if fixed and len(fixed) < len(blocks):
        warnings.warn(
            f"{len(fixed)} layers of {type(model).__name__}, the first is {fixed[0].name}, stay whatever they are "
            "worth: its config could not say that they are gone",
            stacklevel=2,
        )
    for block in fixed:  # only now: what is tried counts all layers
        block.fixed = True


def _runs_without(model: nn.Module, blocks: list[Block], block: Block) -> bool:
    try:
        kept = torch.tensor([other is not block for other in blocks])
        left = _check_stored(model, blocks, Removal(["layers"], kept))
        discover(left, sample_input(left))
    except ValueError:
        return False
    return True


def try_without(model: nn.Module, blocks: list[Block], kind: str) -> None:
    """Cut a unit out of every part of a kind, or every second part where each is one unit, and run what is left.

    Raises:
        ValueError: it does not run: something in it, that sparsekit does not know, belongs to those units.
    """
    units = find_units(model, blocks, [kind])
    kept = torch.ones(len(units), dtype=torch.bool)
    for number, each in enumerate(units.split(kept)):
        each[-1] = len(each) == 1 and number % 2 == 1
    left = _check_stored(model, blocks, Removal([kind], kept))
    try:
        discover(left, sample_input(left))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} does not run without some of its {kind} ({reason}), so none are removed: choose "
            "other units"
        ) from error


def _check_stored(model: nn.Module, blocks: list[Block], removal: Removal) -> nn.Module:
    """What such a removal leaves of a model that is whole. Raises ValueError where no config could build it again."""
    other = copy.deepcopy(model)
    try:
        units = removal.apply(other, adopt(other, blocks))
        Shape.of(other, [(units, removal)])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:  # of a family's own making
        what = " and ".join(removal.kinds)
        raise ValueError(f"{type(model).__name__} cannot do without some of its {what}: {error}") from error
    return other


def check_carried(recipe: Recipe, model: nn.Module, blocks: list[Block], tokens: Tensor) -> None:
    """Before anything heavy: that the blocks, one after another, compute what the model computes.

    blocks: of the model, as they were found in its skeleton

    Raises:
        ValueError: they do not; see `walk.check_walk`.
    """
    if any(effect.prunes or effect.cuts or effect.resizes for effect in map(effect_of, recipe.stages)):
        check_walk(model, adopt(model, blocks), tokens)


def removing_of(stage: Stage) -> tuple[list[str], Any, str] | None:
    """The kinds of units that a structural stage removes, its `remove`, and the shape; None for other stages."""
    if kind(stage) == "criterion":
        function: Any = registry.load("criteria", stage.name)
        given = options_of("criteria", stage.name, stage.options)
        kinds = kinds_of(given["units"] or list(function.scoring.removes))
        Context.check_kinds(stage.name, kinds)
        return kinds, given["remove"], given["shape"] or function.scoring.shape
    if not effect_of(stage).cuts:
        return None
    given = options_of("stages", stage.name, stage.options)
    if not {"units", "remove", "shape"} <= given.keys():  # the names that `contracts.removing` gives these three
        return None
    kinds = kinds_of(given["units"])
    return kinds, given["remove"], given["shape"] or ("uniform" if kinds == ["experts"] else "free")
