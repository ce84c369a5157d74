"""alps against a slow reference in float64, and against the best mask of all on tiny problems."""

from itertools import combinations

import pytest
import torch

from sparsekit.maths import NM, Stats, Unstructured
from sparsekit.solvers.alps import alps
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import check_solver

PAPER = {"damping": 0.01, "ridge": "mean", "iterations": 300, "rho": 0.1, "pace": 1.0}


def problem(out=12, width=32, count=128, seed=0, drift=0.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=dtype)

    x = normal(count, width) @ normal(width, width)
    return normal(out, width), x, (x + drift * x.std() * normal(count, width) if drift else None)


def largest(score, pattern):
    """Sorted, one scope after the other."""
    scopes = score.reshape(-1, pattern.group) if isinstance(pattern, NM) else score.reshape(1, -1)
    gone = scopes.shape[1] - pattern.kept if isinstance(pattern, NM) else int(pattern.sparsity * scopes.shape[1])
    keep = torch.ones_like(scopes, dtype=torch.bool)
    for scope, mask in zip(scopes, keep, strict=True):
        mask[scope.argsort(stable=True)[:gone]] = False
    return keep.view(score.shape)


def slow(weight, x, dense, pattern, damping, ridge, iterations, rho, pace):
    """The paper's algorithm with one eigendecomposition, then exact least squares for every row."""
    gram = x.t() @ x
    assert ridge == "mean"
    added = damping * gram.diagonal().mean()
    gram = gram + added * torch.eye(len(gram), dtype=gram.dtype)
    norm = gram.diagonal().sqrt() + 1e-8
    values, vectors = torch.linalg.eigh(gram / norm[:, None] / norm)
    target = weight @ ((x if dense is None else dense).t() @ x) + added * weight
    w0 = weight * norm
    d, v, old, raised = w0, torch.zeros_like(w0), None, False
    for i in range(1, iterations + 1):
        b = (target / norm - v + rho * d) @ vectors @ torch.diag(1 / (values + rho)) @ vectors.t()
        mask = largest((b + v / rho).abs(), pattern)
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        old = mask if old is None else old
        if i % 3 == 0 and i < iterations:
            changed = int((mask != old).sum())
            change, old = changed / int(mask.sum()), mask
            if i > 30 and change < 3e-4:
                break
            if change > 0.1:
                rho, raised = rho * 1.3**pace, True
            elif change > 0.005:
                rho, raised = rho * 1.2**pace, True
            elif not raised:
                rho, d, v, old = rho / 5, w0, torch.zeros_like(w0), None
            elif changed:
                rho *= 1.1**pace
            else:
                break
    answer = torch.zeros_like(weight)
    for row, kept in enumerate(largest(b.abs(), pattern)):
        answer[row, kept] = torch.linalg.solve(gram[kept][:, kept], target[row, kept])
    return answer


def test_contract():
    check_solver(alps)


@pytest.mark.parametrize("drift", [0.0, 0.2])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(1, 4)])
@pytest.mark.parametrize(
    "options", [PAPER, PAPER | {"rho": 300.0}, {**PAPER, "iterations": 9, "rho": 0.5, "pace": 2.0}]
)
def test_reference(pattern, drift, options):
    """Also with a rho so large that the support does not move and the search starts again."""
    weight, x, dense = problem(drift=drift)
    expected = slow(weight, x, dense, pattern, **options)
    answer = alps(weight, Stats.of(x, dense), pattern, **options)
    assert torch.equal(answer != 0, expected != 0)
    stats = Stats.of(x)  # refit stops when an iteration brings less than a thousandth
    assert stats.error(answer, expected) < 0.02 * stats.error(expected, weight)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_near_the_best_of_all_masks(pattern):
    """Rows of 8: all 70 masks, each with its least-squares weights; nearer to the best than Wanda's mask gets."""
    mine = lowest = other = 0.0
    for seed in range(4):
        weight, x, _ = problem(out=8, width=8, count=32, seed=seed)
        stats = Stats.of(x)
        best = torch.zeros_like(weight)
        for row, w in enumerate(weight):
            least = torch.inf
            for columns in map(list, combinations(range(8), 4)):
                v = torch.zeros_like(w)
                v[columns] = torch.linalg.lstsq(x[:, columns], (x @ w)[:, None]).solution.squeeze(1)
                error = float((x @ (v - w)).square().sum())
                if pattern.satisfied(v[None]) and error < least:
                    least, best[row] = error, v
        lowest += stats.error(best, weight)
        mine += stats.error(alps(weight, stats, pattern, **PAPER | {"damping": 1e-4}, per="row"), weight)
        start = wanda(weight, stats, pattern)
        other += stats.error(refit(weight, stats, pattern, start, damping=1e-4), weight)
    assert lowest <= mine * (1 + 1e-9)
    assert mine - lowest < 0.5 * (other - lowest), (mine / lowest, other / lowest)


@pytest.mark.parametrize("drift", [0.0, 0.2])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)])
def test_better_than_sparsegpt_and_its_refit(pattern, drift):
    weight, x, dense = problem(out=48, width=96, count=400, drift=drift, dtype=torch.float32)
    stats = Stats.of(x, dense)
    start = sparsegpt(weight, stats, pattern)
    error = stats.error(alps(weight, stats, pattern), weight)
    assert error < 0.93 * stats.error(start, weight)
    assert error < stats.error(refit(weight, stats, pattern, start), weight)


def test_one_factor_for_linears_of_one_input_and_fresh_ones_after_more_tokens():
    weight, x, _ = problem()
    stats, pattern = Stats.of(x), Unstructured(0.5)
    first = alps(weight, stats, pattern)
    stats.cached(("alps", None, "root", 0.5), lambda: pytest.fail("the first inverse was not kept"))
    assert torch.equal(alps(weight, stats, pattern), first)
    stats.add(x[:9] * 3)
    again = Stats.of(torch.cat([x, x[:9] * 3]))  # the same sums in another order: other last bits, no other answer
    assert torch.allclose(alps(weight, stats, pattern), alps(weight, again, pattern), rtol=1e-9, atol=1e-9)


def test_rank_deficient_gram_without_damping():
    weight, x, _ = problem(count=10, dtype=torch.float32)
    answer = alps(weight, Stats.of(x), NM(2, 4), damping=0.0)
    assert answer.isfinite().all() and NM(2, 4).satisfied(answer)


@pytest.mark.parametrize("width", [96, 102])
def test_supports_from_a_sample_are_as_good(width, monkeypatch):
    """Of large matrices; also where the stride would divide the width. The last support is exact."""
    weight, x, _ = problem(out=80, width=width, count=400, dtype=torch.float32)
    stats, pattern = Stats.of(x), Unstructured(0.5)
    given = {"damping": 0.1, "ridge": "mean"}  # small, so that the error on these tokens is what is minimised
    exact = stats.error(alps(weight, stats, pattern, **given), weight)
    monkeypatch.setattr("sparsekit.solvers.alps._EXACT", 0)
    answer = alps(weight, stats, pattern, **given)
    assert int((answer == 0).sum()) == answer.numel() // 2
    assert stats.error(answer, weight) == pytest.approx(exact, rel=0.03)
    assert stats.error(answer, weight) != exact


def test_scope_of_rows():
    weight, x, _ = problem()
    assert (alps(weight, Stats.of(x), Unstructured(0.5), per="row") != 0).sum(1).tolist() == [16] * 12


def test_mistakes():
    weight, x, _ = problem()
    stats = Stats.of(x)
    with pytest.raises(ValueError, match="init has shape"):
        alps(weight, stats, NM(2, 4), weight[:2])
    with pytest.raises(ValueError, match="rho and pace above 0"):
        alps(weight, stats, NM(2, 4), rho=0.0)
    with pytest.raises(ValueError, match="do not divide"):
        alps(weight, stats, NM(2, 5))
