"""What each stage holds in memory beside activations, and how a budget is kept: by the same numbers."""

from collections.abc import Callable, Sequence

import torch

from sparsekit import registry
from sparsekit.contracts import held
from sparsekit.maths import Norms
from sparsekit.model import Block
from sparsekit.recipe import Recipe, Stage, effect_of, kind, named_solvers, options_of
from sparsekit.run.allocation import postponed
from sparsekit.run.methods import statistics_for
from sparsekit.system import human_size
from sparsekit.walk import COUPLED, TOGETHER, in_turns

PROCESS = 6 * 10**8  # bytes of Python and its libraries, without any model
LEAST = 64 * 10**6  # of activations: a few chunks
TRAINED = 21  # bytes a parameter of a block in training: float32 and best copy, gradient, moments of AdamW; measured
COSTED = 24  # bytes a weight while its cost is computed: float32 four times, and an order

Needs = dict[str, int]  # what -> bytes


def within(
    recipe: Recipe, segments: Sequence[Sequence[Stage]], blocks: list[Block], dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of activations, and of Gram matrices at a time, that keep the recipe's budget; its own where it has none.

    Raises:
        ValueError: no sizes keep it; the message has the smallest budget that can be kept.
    """
    given, budget = recipe.memory, recipe.memory.budget
    if budget is None:
        return given.activations, given.statistics
    told = memory_needs(recipe, segments, blocks, dtype)
    least, stage = max(((sum(parts.values()), name) for name, parts in told.items()), default=(PROCESS, "the process"))
    left = budget - least
    if left < LEAST:
        raise ValueError(
            f"memory.budget is {human_size(budget)}, and {stage} needs {human_size(least + LEAST)}: give at least "
            "that, or a method that needs less (--dry-run without a budget shows what each stage holds)"
        )
    if not any(block.experts for block in blocks):
        return min(given.activations, left), given.statistics
    return min(given.activations, left // 2), min(given.statistics, left // 2)  # experts' Grams come in turns


def memory_needs(
    recipe: Recipe, segments: Sequence[Sequence[Stage]], blocks: list[Block], dtype: torch.dtype
) -> dict[str, Needs]:
    """What stages that walk hold at once beside activations, by their names; of experts' Grams those of one expert."""
    found: dict[str, Needs] = {}
    if recipe.pattern is not None and postponed(recipe) == "curvature":
        found[f"allocation by {recipe.allocation.name}"] = _there_and_back(recipe, blocks, dtype)
    for stages in segments:
        solvers = solvers_of(stages)
        if not solvers:
            continue
        parts = _walk(recipe, solvers, blocks, dtype)
        if effect_of(stages[-1]).gradients:  # in turn: a block is trained, and pruned
            pruning = {what: parts.pop(what) for what in ("Gram matrices that are left", "the linear that is solved")}
            training = {"training it": TRAINED * max(map(_parameters, blocks))}
            parts |= pruning if sum(pruning.values()) > sum(training.values()) else training
        found[" -> ".join(stage.name for stage in stages)] = parts
    return found


def wholly(segments: Sequence[Sequence[Stage]]) -> list[str]:
    """The stages that are given the model as a whole, which is under no budget."""
    return [stages[0].name for stages in segments if not solvers_of(stages)]


def solvers_of(stages: Sequence[Stage]) -> list[Stage]:
    """The solvers of a walk: themselves, or those that a stage with a loop of its own names; none: it does not walk."""
    if kind(stages[0]) == "solver":
        return list(stages)
    if not effect_of(stages[0]).walks:
        return []
    return named_solvers(options_of("stages", stages[0].name, stages[0].options).get("solver", "sparsegpt"))


def _there_and_back(recipe: Recipe, blocks: list[Block], dtype: torch.dtype) -> Needs:
    """Of a backward pass, block by block: all Grams of a block, and what a linear's cost is computed of."""
    length = recipe.calibration.length
    return {
        "process": PROCESS,
        "a block": max(map(_parameters, blocks)) * dtype.itemsize,
        "its Gram matrices": max(
            sum(4 * block.linears[group[0]].shape[1] ** 2 for group in block.groups) for block in blocks
        ),
        "the linear that is weighed": max(
            COSTED * linear.weight.numel() for block in blocks for linear in block.linears.values()
        ),
        "a sequence's way through it and back": max(length * dtype.itemsize * _kept(block) for block in blocks),
    }


def _kept(block: Block) -> int:
    """Numbers a token that a backward pass through a block keeps: what enters linears, three times what they give."""
    entering = sum(block.linears[group[0]].shape[1] for group in block.groups)
    return entering + 3 * sum(linear.shape[0] for linear in block.linears.values())


def _walk(recipe: Recipe, solvers: Sequence[Stage], blocks: list[Block], dtype: torch.dtype) -> Needs:
    coupled, twin = recipe.error_correction in COUPLED, recipe.error_correction in ("block", "model")
    largest = max(map(_parameters, blocks))
    functions = [registry.load("solvers", stage.name) for stage in solvers]
    given = 4 * len(solvers)  # bytes a weight: the dense one, and the answers that later solvers of a chain start from

    def solving(shape: tuple[int, int]) -> int:
        return given * shape[0] * shape[1] + max(held(each, *shape) for each in functions)

    norms = statistics_for(solvers) is Norms
    grams, linear = max((_step(block, coupled, norms, solving, 3 if twin else 1) for block in blocks), key=sum)
    return {
        "process": PROCESS,
        "a block, twice" if twin else "a block": largest * dtype.itemsize * (2 if twin else 1),
        "its masks": largest,
        "Gram matrices that are left": grams,
        "the linear that is solved": linear,
    }


def _step(
    block: Block, coupled: bool, norms: bool, solving: Callable[[tuple[int, int]], int], moments: int
) -> tuple[int, int]:
    """Bytes of Grams, and of what is solved, where they are most together: a group's Gram goes once it is solved."""
    sizes = [0 if norms else 4 * block.linears[names[0]].shape[1] ** 2 for names in block.groups]
    steps = [(0, 0)]
    for turn in in_turns(block, 0):
        for place, group in enumerate(turn):
            shapes = {block.linears[name].shape for name in block.groups[group]} | {_together(block, group)}
            left = moments * sizes[group] if coupled else sum(sizes[each] for each in turn[place:])
            steps.append((left, max(map(solving, shapes))))
    return max(steps, key=sum)


def _together(block: Block, group: int) -> tuple[int, int]:
    """The shape of what may be solved in one call, of the linears of one input."""
    shapes = [block.linears[name].shape for name in block.groups[group]]
    width = shapes[0][1]
    return min(sum(out for out, _ in shapes), -(-TOGETHER // width)), width


def _parameters(block: Block) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())
