"""FISTAPruner: a lasso for every linear, solved by FISTA and rounded to the pattern."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from sparsekit.maths import NM, Pattern, Scope, Stats, has_pattern, row_totals, thinned
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda

Start = Literal["sparsegpt", "wanda", "magnitude", "dense"]
Search = Literal["geometric", "arithmetic", "relative"]
_STARTS: dict[str, Callable[[Tensor, Stats, Pattern], Tensor]] = {
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,
    "dense": lambda weight, stats, pattern: weight,
}
_SAMPLE = 2**16
_POWER_STEPS = 50
_MARGIN = 1.02  # power iterations approach the largest eigenvalue from below; a step must not exceed its inverse


@torch.no_grad()
def fista(
    weight: Tensor,
    stats: Stats,
    pattern: Pattern,
    init: Tensor | None = None,
    *,
    start: Start = "sparsegpt",
    iterations: Annotated[int, Ge(1)] = 16,
    tolerance: Annotated[float, Ge(0)] = 1e-6,
    penalty: Annotated[float, Ge(0)] = 0.2,
    search: Search = "geometric",
    bracket: tuple[float, float] = (0.05, 0.8),
    rounding: Annotated[float, Ge(0), Le(1)] = 0.3,
    rounds: Annotated[int, Ge(0)] = 1,
    patience: Annotated[int, Ge(1)] = 3,
    epsilon: Annotated[float, Ge(0), Lt(1)] = 1e-3,
    per: Scope = "matrix",
    rowwise: bool = True,
    precondition: bool = True,
    damping: Annotated[float, Ge(0)] = 0.3,
    restart: bool = False,
    refit: Annotated[int, Ge(0)] = 5,
    polish: Annotated[int, Ge(0)] = 0,
) -> Tensor:
    """Minimise 1/2 ||V x - W x_d||^2 + penalty sum |V_ij| by FISTA, round to the pattern, adapt the penalty, repeat.

    A round runs FISTA from the best answer so far and zeroes the smallest |V_ij|. If the share of the rounding in the
    error, 1 - ||V_relaxed x - W x_d|| / ||V_rounded x - W x_d||, is above `rounding`, the penalty rises, else it falls,
    by bisection. The best rounded answer is kept, so none is worse than the start (rounded, if it was not sparse) in
    ||V x - W x_d||^2 + damping sum G_jj (V_ij - W_ij)^2. More sparsity from a higher penalty is sure only for a
    diagonal Gram (the paper's theorem 1); the search relies on it for speed, never for the pattern or the best answer.
    The defaults are not the paper's, but what measured best for their cost; the paper's are in
    recipes/papers/fistapruner.yaml.

    start: where to begin without init: "sparsegpt", "wanda", "magnitude" or "dense".
    iterations: K, at most, in a round; a round ends before when no more than `tolerance` of the dense weight's norm
        (Frobenius, in the coordinates that are solved for) changed. The paper's 1e-6 is absolute, so that it depends on
        the units of inputs.
    penalty: lambda of the first round.
    search: "geometric": bisect the logarithm of lambda, in units of the |W_ij| H_jj that would fall to the pattern if
        inputs were uncorrelated; "arithmetic": lambda itself, in absolute units, as in the paper; "relative": the same
        in units of the largest entry of W H, the least lambda of which nothing but zeros is the answer.
    bracket: where the search stays, [0, M] in the paper.
    rounding: xi.
    rounds: at most.
    patience: T, rounds in a row without a better answer before it stops.
    epsilon: stop after a round that lowers the error (not squared) by less than this fraction.
    per: where weights compete in an unstructured rounding: "matrix", "row" or a number of columns.
    rowwise: where rows do not compete (n:m, per "row"), a lambda, a bracket and a best answer for each row.
    precondition: solve for V_ij sqrt(H_jj), H = G + ridge, so with the penalty on |V_ij| sqrt(H_jj), Wanda's measure.
    damping: the ridge that pulls V_ij to W_ij, in units of G_jj.
    restart: forget a row's momentum when it points uphill (O'Donoghue & Candes 2015).
    refit: conjugate gradient steps on the support after each rounding, before answers are compared.
    polish: the same for the best answer at the end.

    Source: FISTAPruner: Layer-wise Post-training Pruning for Large Language Models, alg. 1, eq. 3-8; the momentum is
    Beck & Teboulle's (2009), over the two last proximal points. Beyond it: geometric, rowwise, precondition, damping,
    restart, refit, polish.
    Cost: 1 + rounds (iterations + 1 + refit) + polish products (out, in) x (in, in), 23 by default, and the start; two
    more with a dense stream. Memory: one more matrix of the Gram's size, shared by linears of one input, and about
    eight of the weight's.
    Raises ValueError for options out of range and for a weight or init that is not finite or does not fit the
    statistics or the pattern.
    """
    stats.check_weight(weight, init)
    pattern.check(stats.width, "this layer")
    _check(start, search, bracket, penalty, iterations, rounds, patience, rounding, epsilon)
    _check_nonnegative(tolerance=tolerance, damping=damping, refit=refit, polish=polish)
    begin = _STARTS[start](weight, stats, pattern) if init is None else init
    gram, scale, largest = stats.cached(("fista", precondition, damping), lambda: _scaled(stats, precondition, damping))
    dense = weight.to(gram)
    problem = _Quadratic(
        gram,
        largest,
        dense * scale,
        None if stats.drift_cross is None else (dense @ stats.drift_cross).div_(scale),
        0 if stats.drift_gram is None else _dot(dense @ stats.drift_gram, dense),
        rowwise and (per == "row" or isinstance(pattern, NM)),
    )
    origin = begin.to(gram) * scale
    # what has the pattern, in whatever scope weights competed there, is not rounded in this one; by rows it must be
    ready = has_pattern(begin, pattern) and (isinstance(pattern, NM) or not problem.rowwise)
    best = _round(problem, origin, origin.abs(), pattern, per, ready)
    unit: Tensor | float = 1.0
    if search != "arithmetic":
        unit = _unit(problem, pattern) if search == "geometric" else _largest(problem)
    low, high, level = (torch.full_like(best.error, value) for value in (*bracket, penalty))  # (out or 1, 1)
    missed, gain = torch.zeros_like(level), torch.full_like(level, math.inf)
    for _ in range(rounds):
        relaxed, slope, score = _fista(problem, best, level * unit, iterations, tolerance, restart)
        rounded = _round(problem, relaxed, score, pattern, per)
        candidate = _refit(problem, rounded, refit)
        better = candidate.error < best.error
        missed = torch.where(better, 0, missed + 1)
        gain = torch.where(better, 1 - candidate.error / best.error, gain)
        best = _best(best, candidate)
        if ((missed >= patience) | (gain < epsilon)).all():
            break
        sparse = rounded.error - problem.error(relaxed, slope) <= rounding * rounded.error
        low, high = torch.where(sparse, low, level), torch.where(sparse, level, high)
        level = (low * high).sqrt() if search == "geometric" else (low + high) / 2
    best = _best(best, _refit(problem, best, polish))
    return (best.answer / scale).to(weight.dtype)


fista.memory = (19, 2.1)  # type: ignore[attr-defined]  # see contracts.held


@dataclass(frozen=True)
class _Quadratic:
    """tr((V - W) gram (V - W)') - 2 tr(pull (V - W)') + constant, in the scaled coordinates."""

    gram: Tensor  # (in, in)
    largest: float  # eigenvalue of the Gram
    dense: Tensor  # (out, in)
    pull: Tensor | None  # (out, in), with a dense stream
    constant: Tensor | int  # (out, 1)
    rowwise: bool  # errors (out, 1), else (1, 1)

    def slope(self, answer: Tensor) -> Tensor:
        """Half the gradient; affine in the answer. One product."""
        product = (answer - self.dense) @ self.gram
        return product if self.pull is None else product.sub_(self.pull)

    def error(self, answer: Tensor, slope: Tensor) -> Tensor:
        """The root of the objective from the slope at the answer: no product, no difference of large sums."""
        linear = slope if self.pull is None else slope - self.pull
        square = _dot(answer - self.dense, linear) + self.constant
        return (square if self.rowwise else square.sum(0, keepdim=True)).clamp_(min=0).sqrt_()


class _Point(NamedTuple):
    """A sparse answer with what is known of it, so that nothing is computed twice."""

    answer: Tensor  # (out, in)
    slope: Tensor  # (out, in)
    support: Tensor  # (out, in)
    error: Tensor  # (out or 1, 1)


def _best(old: _Point, new: _Point) -> _Point:
    better = new.error < old.error
    return _Point(*(torch.where(better, theirs, ours) for theirs, ours in zip(new, old, strict=True)))


def _round(
    problem: _Quadratic, answer: Tensor, score: Tensor, pattern: Pattern, per: Scope, sparse: bool = False
) -> _Point:
    support = answer != 0 if sparse else pattern.keep(score, per=per)
    answer = answer.masked_fill(~support, 0)
    slope = problem.slope(answer)
    return _Point(answer, slope, support, problem.error(answer, slope))


def _fista(
    problem: _Quadratic, best: _Point, penalty: Tensor, iterations: int, tolerance: float, restart: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The last proximal point, its slope, and its score.

    The score is the size before shrinkage: among entries that are not zero it ranks as the point itself, and it goes on
    ranking among zeros, where a point sparser than the pattern would leave the choice to chance.
    """
    threshold = (penalty / problem.largest).to(problem.dense)  # (out or 1, 1)
    now, now_slope = point, point_slope = best.answer, best.slope
    momentum, size = now.new_ones(len(now), 1), problem.dense.norm()
    for _ in range(iterations):
        step = torch.add(point, point_slope, alpha=-1 / problem.largest)
        new = step.clamp(-threshold, threshold).neg_().add_(step)  # soft shrinkage
        new_slope = problem.slope(new)
        moved = new - now
        if restart:
            momentum = torch.where((point - new).mul_(moved).sum(1, keepdim=True) > 0, 1, momentum)
        later = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        along, momentum = (momentum - 1) / later, later
        point = torch.addcmul(new, along, moved)
        point_slope = torch.lerp(new_slope, now_slope, -along)  # affine: no second product
        now, now_slope = new, new_slope
        if moved.norm() < tolerance * size:
            break
    return now, now_slope, step.abs_()


def _refit(problem: _Quadratic, point: _Point, iterations: int) -> _Point:
    """Conjugate gradients on the support, preconditioned by the diagonal; the whole slope is kept up to date."""
    if iterations == 0:
        return point
    diagonal = problem.gram.diagonal()
    inverse = point.support / diagonal.where(diagonal > 0, 1)  # (out, in), zero off the support
    answer, slope = point.answer.clone(), point.slope.clone()
    direction = torch.zeros_like(answer)
    before: Tensor = torch.zeros_like(answer[:, :1])
    # below this a slope is the rounding error of products of this width
    noise = 4 * torch.finfo(answer.dtype).eps ** 2 * len(diagonal) * (problem.dense.square() @ diagonal).unsqueeze(1)
    active = torch.ones_like(before, dtype=torch.bool)
    for _ in range(iterations):
        downhill = (slope * inverse).neg_()
        drop = -(slope * downhill).sum(1, keepdim=True)  # (out, 1)
        active &= drop > noise
        if not active.any():
            break
        direction = torch.addcmul(downhill, _ratio(drop, before), direction)
        product = direction @ problem.gram
        length = _ratio(drop, (direction * product).sum(1, keepdim=True)) * active
        answer.addcmul_(length, direction)
        slope.addcmul_(length, product)
        before = drop
    if not active.all():  # the running slope has drifted by as much as is left of it
        slope = problem.slope(answer)
    return _Point(answer, slope, point.support, problem.error(answer, slope))


def _unit(problem: _Quadratic, pattern: Pattern) -> Tensor:
    """The lambda that leaves the pattern's sparsity when inputs are uncorrelated (out or 1, 1)."""
    size = (problem.dense * problem.gram.diagonal()).abs_()
    if not problem.rowwise:
        size = thinned(size, _SAMPLE)[None]  # a selection among all would cost as much as a product
    return size.kthvalue(max(1, round(pattern.sparsity * size.shape[1])), dim=1, keepdim=True).values


def _largest(problem: _Quadratic) -> Tensor:
    """The lambda of which zero is the solution: the largest entry of the slope there (out or 1, 1)."""
    slope = problem.slope(torch.zeros_like(problem.dense)).abs_()
    return slope.amax(1, keepdim=True) if problem.rowwise else slope.max().view(1, 1)


def _scaled(stats: Stats, precondition: bool, damping: float) -> tuple[Tensor, Tensor, float]:
    """The Gram with its ridge in scaled coordinates, the scale (in,) and the largest eigenvalue."""
    diagonal = stats.gram.diagonal() * (1 + damping)
    scale = diagonal.sqrt().where((diagonal > 0) & precondition, 1)
    gram = stats.gram / scale
    gram.div_(scale.unsqueeze(1)).diagonal().copy_(diagonal / scale.square())
    vector = torch.randn(len(gram), generator=torch.Generator().manual_seed(0)).to(gram)
    for _ in range(_POWER_STEPS):
        vector = gram @ (vector / vector.norm().clamp(min=1e-30))
    return gram, scale, _MARGIN * float(vector.norm()) or 1.0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return row_totals(a * b)  # (out, 1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0)


def _check(
    start: str,
    search: str,
    bracket: tuple[float, float],
    penalty: float,
    iterations: int,
    rounds: int,
    patience: int,
    rounding: float,
    epsilon: float,
) -> None:
    if start not in _STARTS:
        raise ValueError(f"start is one of {', '.join(_STARTS)}, not {start!r}")
    if search not in ("geometric", "arithmetic", "relative"):
        raise ValueError(f"search is geometric, arithmetic or relative, not {search!r}")
    if len(bracket) != 2 or not 0 <= bracket[0] <= penalty <= bracket[1] < math.inf:
        raise ValueError(
            f"bracket is two numbers from 0 up with the penalty between them, not {list(bracket)} for {penalty}"
        )
    if search == "geometric" and bracket[0] == 0:
        raise ValueError("a geometric search cannot begin its bracket at 0; begin above it or use search: arithmetic")
    if iterations < 1 or rounds < 0 or patience < 1:
        raise ValueError(
            f"iterations and patience must be at least 1 and rounds at least 0, not {iterations}, {patience}, {rounds}"
        )
    if not 0 <= rounding <= 1 or not 0 <= epsilon < 1:
        raise ValueError(f"rounding is from 0 to 1 and epsilon from 0 to below 1, not {rounding} and {epsilon}")


def _check_nonnegative(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, not {value}")
