"""A criterion as a stage of its own: units are scored, the worst are removed."""

import inspect
from typing import Any

from sparsekit import registry
from sparsekit.contracts import share
from sparsekit.model.structure import kinds_of
from sparsekit.recipe import Stage, options_of
from sparsekit.run.context import Context


def remove_by(stage: Stage, context: Context) -> None:
    """Run a criterion with the options of `contracts.removing` beside its own, and commit what it decides.

    Raises:
        ValueError: options that would have no effect, units that the model does not have or cannot give up.
    """
    function: Any = registry.load("criteria", stage.name)
    given = options_of("criteria", stage.name, stage.options)
    scoring = function.scoring
    parameters = inspect.signature(function).parameters.values()
    own = {p.name: given[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "remove"}
    shape = given["shape"] or scoring.shape
    bias = scoring.bias if given["bias"] is None else given["bias"]
    if given["bias"] and not given["compensate"] and not scoring.bias:
        raise ValueError("bias: true is part of least squares; give compensate: true with it, or leave it out")
    kinds = kinds_of(given["units"] or list(scoring.removes))
    context.check_kinds(stage.name, kinds)
    cutting = context.cutting(
        given["remove"],
        kinds,
        compensate=given["compensate"],
        bias=bias,
        damping=given["damping"],
        shape=shape,
        budgets=scoring.budgets if shape == "free" else "separate",
    )
    cutting.finish(context.decide(stage.name, cutting.units, share(given["remove"]), **own))
