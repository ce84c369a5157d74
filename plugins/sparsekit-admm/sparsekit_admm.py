"""ADMM pruning with a fixed penalty and a gradual mask, as a sparsekit plugin."""

import torch
from sparsekit.maths import NM, Pattern, Scope, Stats, Unstructured
from torch import Tensor


@torch.no_grad()
def admm(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    *,
    damping: float = 0.1,
    rho: float = 1.0,
    iterations: int = 20,
    prune: int = 15,
    gradual: bool = False,
    per: Scope = "matrix",
) -> Tensor:
    """Minimise ||V x - W x_d||^2 + damping ||V - W||^2 by ADMM, choosing the mask on the way.

    In units where the Gram has diagonal 1, with H = Gram + damping and B = W H (plus the dense stream's part), from
    V = W and U = 0:
        M = mask of the largest |V + U|;  Z = (V + U) o M;  U += V - Z;  V = (B + rho (Z - U)) (H + rho)^-1.
    The answer is (V + U) o M: kept weights change.

    damping: in units of the diagonal after scaling.
    prune: iterations that choose the mask; in the others it stays.
    gradual: let the sparsity of iteration t < prune be s - s (1 - (t + 1) / prune)^3. For n:m that is always so, as
        published: the weights that the group would keep are safe, the others go from the whole matrix in that order.
    per: where weights compete: "matrix" (as published), "row", or a number of columns.

    Source: Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models.
    Cost: one inverse for all linears of one input; a product (out, in) x (in, in) and a selection an iteration.
    Raises ValueError for a weight that is not finite or does not fit the statistics or the pattern.
    """
    stats.check_weight(weight)
    pattern.check(stats.width, "this layer")
    if not damping >= 0 or not rho > 0 or not 1 <= prune <= iterations:
        raise ValueError(
            "damping must be at least 0, rho above 0 and prune from 1 to iterations, "
            f"not {damping}, {rho}, {prune} and {iterations}"
        )
    inverse, norm = stats.cached(("admm", damping, rho), lambda: _inverse(stats.gram, damping, rho))
    dense = weight.to(stats.gram)
    linear = stats.target(dense).div_(norm).addcmul_(dense, norm, value=damping)  # (out, in)
    free = dense * norm
    dual = torch.zeros_like(free)
    mask = torch.ones_like(free, dtype=torch.bool)
    for step in range(iterations):
        point = free + dual
        if step < prune:
            mask = _mask(point.abs(), pattern, 1 - (1 - (step + 1) / prune) ** 3, gradual, per)
        sparse = point * mask
        dual = point - sparse  # U + V - Z
        free = (linear + rho * (sparse - dual)) @ inverse
    return ((free + dual) / norm).masked_fill_(~mask, 0).to(weight.dtype)


admm.memory = (9, 1.1)  # type: ignore[attr-defined]  # see sparsekit.contracts.held


def _inverse(gram: Tensor, damping: float, rho: float) -> tuple[Tensor, Tensor]:
    norm = gram.diagonal().sqrt() + 1e-8
    shifted = gram / norm / norm.unsqueeze(1)
    shifted.diagonal().add_(damping + rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)), norm


def _mask(score: Tensor, pattern: Pattern, progress: float, gradual: bool, per: Scope) -> Tensor:
    final = pattern.keep(score, per=per)
    if progress == 1:
        return final
    if isinstance(pattern, NM) and (pattern.pairs or score.shape[1] % pattern.group):
        return final  # on the way to it weights would compete one by one, and in the columns that stay dense
    if isinstance(pattern, NM):
        return Unstructured(pattern.sparsity * progress).keep(score.masked_fill(final, torch.inf), per=per)
    return Unstructured(pattern.sparsity * progress).keep(score, per=per) if gradual else final
