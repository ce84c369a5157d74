"""A structural stage that asks for a speed or a size becomes one that removes a share."""

from dataclasses import replace

from sparsekit.contracts import goal
from sparsekit.model.structure import Cuts
from sparsekit.recipe import Stage
from sparsekit.run.ahead import removing_of
from sparsekit.run.context import Context
from sparsekit.run.goals import decided
from sparsekit.run.plan import Plan


def aimed(stage: Stage, planned: Plan, context: Context, cuts: Cuts) -> Stage:
    """The stage with the share that its `remove` comes to, where it asks for a speed or a size.

    cuts: what was cut out of the model before

    Raises:
        ValueError: see `goals.decided`.
    """
    options = removing_of(stage)
    if options is None or goal(options[1]) is None:
        return stage
    kinds, given, shape = options
    remove = 0.0
    if context.team.rank == 0:
        with context.meter.stage("aim"):
            remove = decided(
                given,
                kinds,
                shape,
                context.model,
                context.blocks,
                context.tokenizer(),
                planned.folder if planned.folder.is_dir() else None,
                cuts,
                context.commits.folder,
                context.device.type,
                lambda line: context.console.print(line, highlight=False, markup=False),
            )
    remove = context.team.tell(remove, 0)  # the others take what the first has measured
    context.console.print(f"{stage.name} removes {remove:.2%} of the blocks' parameters", highlight=False)
    return replace(stage, options={**stage.options, "remove": remove})
