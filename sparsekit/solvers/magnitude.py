"""Magnitude pruning: the smallest weights go."""

from torch import Tensor

from sparsekit.maths import NM, Norms, Pattern, Scope


def magnitude(weight: Tensor, stats: Norms, pattern: Pattern, *, per: Scope = "matrix") -> Tensor:
    """Keep the weights of largest |W_ij| and leave them as they are; no calibration data is looked at.

    per: where weights compete: "matrix" (the published baseline), "row", or a number of columns.

    Source: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks.
    Cost: one selection. Raises ValueError for a weight that is not finite or does not fit the statistics.
    """
    stats.check_weight(weight)
    return weight.masked_fill(~pattern.keep(weight.abs(), per=per), 0)


magnitude.memory = (3, 0)  # type: ignore[attr-defined]  # see contracts.held
magnitude.rows_apart = lambda pattern, options: isinstance(pattern, NM) or options.get("per", "matrix") == "row"  # type: ignore[attr-defined]
