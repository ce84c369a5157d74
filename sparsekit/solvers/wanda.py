"""Wanda: weights and activations."""

from torch import Tensor

from sparsekit.maths import NM, Norms, Pattern, Scope


def wanda(weight: Tensor, stats: Norms, pattern: Pattern, *, per: Scope = "row") -> Tensor:
    """Keep the weights of largest |W_ij| ||x_j|| in every output row and leave them as they are.

    per: where weights compete: "row" (the paper's), "matrix", or a number of columns.

    Source: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, eq. 1.
    Cost: one selection; no Gram matrix is needed. Raises ValueError for a weight that is not finite or
    does not fit the statistics, and for inputs that are not finite.
    """
    stats.check_weight(weight)
    score = weight.abs() * stats.squares.sqrt()  # (out, in)
    return weight.masked_fill(~pattern.keep(score, per=per), 0)


wanda.memory = (3, 0)  # type: ignore[attr-defined]  # see contracts.held
wanda.rows_apart = lambda pattern, options: isinstance(pattern, NM) or options.get("per", "row") == "row"  # type: ignore[attr-defined]
