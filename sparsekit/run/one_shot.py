"""Layer-wise solvers of a recipe, one or several in a row, as one walk."""

from collections.abc import Callable, Sequence

from torch import Tensor

from sparsekit.contracts import Fit
from sparsekit.model import Block, meant
from sparsekit.recipe import Stage, targets_of
from sparsekit.run.context import Context
from sparsekit.run.methods import statistics_for
from sparsekit.walk import OneShot, Walk


def one_shot(context: Context, stages: Sequence[Stage]) -> Fit:
    """What Trainer.fit takes: a walk, its stream, and the callback that solves.

    Each linear gets the chain of those stages whose `targets` mean it.
    """
    stats = statistics_for(stages)
    stream = context.stream(stats=stats, gathered=context.gathered(stats))
    chains: dict[tuple[int, ...], Callable[..., Tensor]] = {}
    solvers = {}
    for block in context.blocks:
        for name in block.linears:
            chosen = tuple(index for index, stage in enumerate(stages) if _is_for(stage, block, name))
            if chosen not in chains:
                chains[chosen] = context.solver([stages[index] for index in chosen])
            solvers[name] = chains[chosen]
    solve = OneShot(solvers, context.patterns, context.seed, continues=not context.first)
    return Fit(Walk(stream), stream, [solve])


def _is_for(stage: Stage, block: Block, name: str) -> bool:
    targets = targets_of(stage)
    return targets is None or any(meant(block, name, target) for target in targets)
