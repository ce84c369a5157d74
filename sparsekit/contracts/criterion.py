"""Criteria: what heads, channels, parts and layers are worth.

A criterion is a function `(context, units, *, remove, options...) -> scores`, found through the entry-point group
`sparsekit.criteria`. It is a stage of its own, with the options of `removing`, and what `policy_gradient` starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from annotated_types import Gt

from sparsekit.contracts.options import Amount
from sparsekit.contracts.stage import Context

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.model.structure import Units

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Scoring:
    """What a criterion declares.

    kinds: of units that it can score: heads (KV groups, or queries that all share one key), channels (of the MLP),
        mamba (channels of a Mamba, heads of a Mamba 2), attention, mlp (whole parts), layers, experts
    removes: the kinds that it removes as a stage of its own unless the recipe says otherwise
    shape, budgets: how units compete then: "free" in the whole model or "uniform" within each block; with "separate"
        budgets for heads and channels, or one that is "joint"
    bias: whether biases make up for what is removed, unless the recipe says otherwise
    gradients: it needs gradients with respect to the model's parameters
    reads: what it can be given; one that goes through `context.through()` alone can be given images too
    """

    kinds: tuple[str, ...]
    removes: tuple[str, ...] = ()
    shape: Literal["free", "uniform"] = "free"
    budgets: Literal["separate", "joint"] = "separate"
    bias: bool = False
    gradients: bool = False
    reads: tuple[Literal["text", "images"], ...] = ("text",)


def scores(*kinds: str, **rest: Any) -> Callable[[F], F]:
    """Declare what a criterion scores: `@scores("heads", "channels", shape="uniform")`; see `Scoring`."""

    def mark(criterion: F) -> F:
        criterion.scoring = Scoring(kinds, **{"removes": kinds, **rest})  # type: ignore[attr-defined]
        return criterion

    return mark


Kinds = Literal["heads-and-channels", "heads", "channels", "mamba", "parts", "attention", "mlp", "layers", "experts"]


def removing(
    *,
    remove: Amount,
    units: Kinds | list[str] | None = None,
    shape: Literal["free", "uniform", "serving"] | None = None,
    compensate: bool = False,
    bias: bool | None = None,
    damping: Annotated[float, Gt(0)] = 0.01,
) -> None:
    """The options that every criterion has as a stage, beside its own; one that it declares itself is given to it.

    remove: share of the blocks' parameters, such as "30%"
    units: what is removed: heads-and-channels, mamba (channels of a Mamba, heads of a Mamba 2), parts (whole attentions
        and MLPs), layers, experts, or a list of kinds; null: what the criterion is made for
    shape: free, units of all blocks compete; uniform, the same number in each block, which plain transformers loads;
        serving, whole attentions and channels by 256 compete, which vLLM runs by `sparsekit export RUN --to deci`;
        null: as published for the criterion
    compensate: make up for what is removed by least squares
    bias: make up by biases too (loads then only where the family has them); null: as published
    damping: of least squares, in units of the Gram's mean diagonal
    """


@dataclass
class Decision:
    """What a criterion found, where scores alone do not say it all.

    scores: (units,); higher is better
    kept: mask (units,) of what stays, where the criterion decides itself; None: the best scores stay
    biases: a function of the final mask (units,) that gives new biases by their names in the model, (out,) each
    notes: for the report; JSON
    """

    scores: "Tensor"
    kept: "Tensor | None" = None
    biases: "Callable[[Tensor], dict[str, Tensor]] | None" = None
    notes: dict[str, Any] = field(default_factory=dict)


class Criterion(Protocol):
    """What structures are worth: `(context, units, *, remove, options...) -> scores (units,)`, or a Decision.

    remove: the share of the blocks' parameters that is to go, from 0 to 1
    """

    def __call__(self, context: Context, units: "Units", /, *, remove: float, **options: Any) -> "Tensor | Decision":
        """Score the units of the model as it is; it is not changed. Higher is better."""
        ...
