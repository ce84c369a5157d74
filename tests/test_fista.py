"""FISTA against slow oracles in float64, the paper's algorithm, and every promise of the docstring."""

import inspect
from functools import partial

import pytest
import torch

from sparsekit.maths import NM, Stats, Unstructured, parse
from sparsekit.solvers.fista import _fista, _Quadratic, _round, _scaled, fista
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import check_solver

PAPER = {
    "start": "wanda",
    "iterations": 20,
    "tolerance": 1e-6,
    "penalty": 1e-5,
    "search": "arithmetic",
    "bracket": (0.0, 1e6),
    "rounding": 0.3,
    "rounds": 50,
    "patience": 3,
    "epsilon": 1e-3,
    "per": "matrix",
    "rowwise": False,
    "precondition": False,
    "damping": 0.0,
    "restart": False,
    "refit": 0,
    "polish": 0,
}


def problem(out=8, width=24, count=200, seed=0, correlation=0.3, drift=0.0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x = normal(count, width) @ (correlation * normal(width, width) + torch.eye(width, dtype=torch.float64))
    return normal(out, width), Stats.of(x, x + drift * normal(count, width) if drift else None), x


def quadratic(weight, stats, rowwise=False):
    """The unscaled problem without ridge."""
    gram, scale, largest = _scaled(stats, False, 0.0)
    assert (scale == 1).all()
    pull = None if stats.drift_cross is None else weight @ stats.drift_cross
    constant = 0 if stats.drift_gram is None else (weight @ stats.drift_gram * weight).sum(1, keepdim=True)
    return _Quadratic(gram, largest, weight, pull, constant, rowwise)


def relaxed(problem, start, penalty, iterations, restart=True):
    best = _round(problem, start, start.abs(), Unstructured(0.0), "matrix")
    level = torch.full_like(best.error, penalty)
    return _fista(problem, best, level, iterations, 0.0, restart)


def coordinate_descent(weight, stats, penalty, sweeps=400):
    """The slow oracle of 1/2 ||V x - W x_d||^2 + penalty sum |V_ij|: one column after another, exactly."""
    gram, target, answer = stats.gram, stats.target(weight), torch.zeros_like(weight)
    for _ in range(sweeps):
        for j in range(len(gram)):
            left = target[:, j] - answer @ gram[:, j] + answer[:, j] * gram[j, j]
            answer[:, j] = left.sign() * (left.abs() - penalty).clamp(min=0) / gram[j, j]
    return answer


def objective(answer, weight, stats, damping):
    ridge = damping * stats.gram.diagonal() * (answer - weight).square()
    return stats.error(answer, weight, energy=1.0) + float(ridge.sum())


def test_defaults_and_paper_keep_the_contract():
    check_solver(fista)
    check_solver(partial(fista, per="row", rounds=3, polish=3), patterns=["50%", "2:4"])
    check_solver(partial(fista, **PAPER), patterns=["50%", "2:4"])
    assert set(PAPER) == {p.name for p in inspect.signature(fista).parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("restart", [False, True])
def test_reaches_the_optimum_of_the_lasso(drift, restart):
    weight, stats, _ = problem(drift=drift)
    penalty = 0.2 * float(stats.target(weight).abs().max())
    oracle = coordinate_descent(weight, stats, penalty)
    assert 0.1 < float((oracle == 0).double().mean()) < 0.95
    answer, _, _ = relaxed(quadratic(weight, stats), wanda(weight, stats, Unstructured(0.5)), penalty, 4000, restart)
    torch.testing.assert_close(answer, oracle, atol=1e-6, rtol=0)
    assert torch.equal(answer == 0, oracle == 0)


def test_momentum_is_that_of_the_two_last_proximal_points():
    """A plain transcription of Beck & Teboulle; the paper's eq. 4d, with the extrapolated point, goes elsewhere."""
    weight, stats, _ = problem()
    quad, penalty, start = quadratic(weight, stats), 5.0, magnitude(weight, stats, Unstructured(0.5))

    def transcription(printed):
        gram, target = stats.gram, stats.target(weight)
        point = proximal = start
        t = 1.0
        for _ in range(12):
            step = point - (point @ gram - target) / quad.largest
            new = step.sign() * (step.abs() - penalty / quad.largest).clamp(min=0)
            later = (1 + (1 + 4 * t * t) ** 0.5) / 2
            point, proximal, t = new + (t - 1) / later * (new - (point if printed else proximal)), new, later
        return proximal

    answer = relaxed(quad, start, penalty, 12, restart=False)[0]
    torch.testing.assert_close(answer, transcription(printed=False))
    assert not torch.allclose(answer, transcription(printed=True))


def test_no_penalty_gives_least_squares_and_a_huge_one_nothing():
    weight, stats, _ = problem(drift=0.3)
    least = torch.linalg.solve(stats.gram, stats.target(weight).t()).t()
    quad = quadratic(weight, stats)
    torch.testing.assert_close(relaxed(quad, weight, 0.0, 3000)[0], least, atol=1e-6, rtol=0)
    assert (relaxed(quad, weight, 1e9, 5)[0] == 0).all()
    start = wanda(weight, stats, Unstructured(0.5))
    kept = fista(weight, stats, Unstructured(0.5), start, **PAPER | {"penalty": 1e6, "rounds": 1})
    assert torch.equal(kept, start)  # zero is no answer, so the start stays


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_error_is_that_of_the_tokens(drift):
    weight, stats, x = problem(drift=drift)
    random = torch.Generator().manual_seed(0)
    for rowwise in (False, True):
        quad = quadratic(weight, stats, rowwise)
        near = weight + 1e-6 * torch.randn(weight.shape, generator=random, dtype=torch.float64)
        for answer in (near, magnitude(weight, stats, Unstructured(0.5))):
            square = float(quad.error(answer, quad.slope(answer)).square().sum())
            assert square == pytest.approx(stats.error(answer, weight, energy=1.0), rel=1e-9)
            if not drift:
                assert square == pytest.approx(float(((answer - weight) @ x.t()).square().sum()), rel=1e-6)


def test_the_step_is_not_too_long():
    for seed in range(5):
        _, stats, _ = problem(seed=seed, correlation=1.0)
        for precondition in (False, True):
            gram, _, largest = _scaled(stats, precondition, 0.3)
            top = float(torch.linalg.eigvalsh(gram)[-1])
            assert top <= largest <= 1.03 * top


def sparsities(weight, stats, levels):
    quad = quadratic(weight, stats)
    return [float((relaxed(quad, weight, level, 2000)[0] == 0).double().mean()) for level in levels]


def test_theorem_1_holds_for_uncorrelated_inputs():
    weight, stats, _ = problem()
    stats.gram = torch.diag(stats.gram.diagonal())
    levels = [0.0, *torch.logspace(-1, 4, 20).tolist()]
    counts = sparsities(weight, stats, levels)
    assert counts[0] == 0 and counts[-1] == 1 and counts == sorted(counts)
    expected = [float((weight.abs() * stats.gram.diagonal() <= level).double().mean()) for level in levels]
    assert counts == pytest.approx(expected, abs=1 / weight.numel())


def test_with_correlated_inputs_only_the_ends_of_theorem_1_are_sure():
    """Between them sparsity may fall as lambda rises; the answer must not depend on which way it goes."""
    weight, stats, _ = problem(out=1, width=12, count=14, correlation=3.0, seed=3)
    highest = float(stats.target(weight).abs().max())
    counts = sparsities(weight, stats, [0.0, *(highest * torch.logspace(-5, 0, 40, dtype=torch.float64)).tolist()])
    assert counts[0] == 0 and counts[-1] == 1
    answer = fista(weight, stats, Unstructured(0.5), rounds=6)
    assert int((answer == 0).sum()) == 6


@pytest.mark.parametrize("pattern", ["50%", "75%", "2:4", "1:4"])
@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"rounds": 4, "refit": 3, "polish": 5}, {"per": "row", "rounds": 3}, PAPER])
def test_no_worse_than_the_start(pattern, drift, options):
    pattern = parse(pattern)
    for seed in range(3):
        weight, stats, _ = problem(width=32, seed=seed, drift=drift)
        per = options.get("per", "matrix")
        chosen = wanda(weight, stats, pattern)
        for init in (chosen, refit(weight, stats, pattern, chosen)):
            answer = fista(weight, stats, pattern, init, **options)
            damping = options.get("damping", 0.3)
            assert objective(answer, weight, stats, damping) <= objective(init, weight, stats, damping) * (1 + 1e-9)
            assert pattern.satisfied(answer, per=per)


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4"])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_better_than_sparsegpt(pattern, drift):
    ours = theirs = 0.0
    for seed in range(4):
        weight, stats, _ = problem(width=32, seed=seed, drift=drift)
        theirs += stats.error(sparsegpt(weight, stats, parse(pattern)), weight)
        ours += stats.error(fista(weight, stats, parse(pattern), damping=0.01), weight)
    assert ours < 0.95 * theirs


def test_a_dense_stream_is_aimed_at():
    weight, stats, x = problem(width=32, drift=0.8)
    blind = Stats.of(x)
    aimed, not_aimed = (fista(weight, given, Unstructured(0.5), damping=0.0) for given in (stats, blind))
    assert stats.error(aimed, weight) < 0.9 * stats.error(not_aimed, weight)


@pytest.mark.parametrize("start", ["sparsegpt", "wanda", "magnitude", "dense"])
def test_starts(start):
    weight, stats, _ = problem(width=32)
    pattern = Unstructured(0.5)
    solver = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude, "dense": lambda w, s, p: w}[start]
    answer = fista(weight, stats, pattern, start=start)
    assert torch.equal(answer, fista(weight, stats, pattern, solver(weight, stats, pattern)))
    assert int((answer == 0).sum()) == weight.numel() // 2
    if start == "dense":  # error zero, but not sparse: it is rounded before it counts as an answer
        assert objective(answer, weight, stats, 0.3) < objective(magnitude(weight, stats, pattern), weight, stats, 0.3)


def test_a_dense_init_is_rounded_by_size_in_the_scaled_coordinates():
    weight, stats, _ = problem(width=32)
    pattern = NM(2, 4)
    torch.testing.assert_close(fista(weight, stats, pattern, weight, rounds=0), wanda(weight, stats, pattern))


def test_the_geometric_search_does_better_than_the_papers_bracket():
    """From 1e-5 the arithmetic one jumps to 5e5, where everything is zero, and lands near the optimum only late."""
    weight, stats, _ = problem(width=32)
    paper, geometric = PAPER | {"rounds": 4}, PAPER | {"rounds": 4, "search": "geometric", "penalty": 0.2}
    geometric["bracket"] = (0.05, 0.8)
    answers = (fista(weight, stats, Unstructured(0.5), **each) for each in (paper, geometric))
    first, second = (stats.error(answer, weight) for answer in answers)
    assert second < first


def test_more_rounds_never_hurt():
    weight, stats, _ = problem(width=32)
    options = {"damping": 0.0, "epsilon": 0.0, "patience": 9}
    errors = [stats.error(fista(weight, stats, NM(2, 4), rounds=rounds, **options), weight) for rounds in range(6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_rows_are_problems_of_their_own():
    weight, stats, _ = problem(width=32)
    start = wanda(weight, stats, NM(2, 4))
    solve = partial(fista, stats=stats, pattern=NM(2, 4), rounds=4, epsilon=0.0, patience=9)
    together = solve(weight, init=start)
    alone = [solve(row[None], init=begin[None]) for row, begin in zip(weight, start, strict=True)]
    torch.testing.assert_close(torch.cat(alone), together)


def test_refit_reaches_least_squares_on_the_support():
    weight, stats, _ = problem(out=3, drift=0.3)
    answer = fista(weight, stats, Unstructured(0.5), per="row", damping=0.0, polish=60)
    for row, dense in zip(answer, weight, strict=True):
        kept = row != 0
        oracle = torch.linalg.solve(stats.gram[kept][:, kept], stats.target(dense[None])[0, kept])
        torch.testing.assert_close(row[kept], oracle, atol=1e-6, rtol=0)


def test_inputs_that_are_all_zero():
    weight, stats = torch.randn(4, 8), Stats.of(torch.zeros(5, 8))
    answer = fista(weight, stats, Unstructured(0.5), start="wanda")
    assert int((answer == 0).sum()) == 16 and answer.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "alps"}, "start is one of sparsegpt, wanda, magnitude, dense, not 'alps'"),
        ({"search": "golden"}, "search is geometric, arithmetic or relative"),
        ({"bracket": (0.3, 0.8)}, "with the penalty between"),
        ({"bracket": (0.05,)}, "bracket is two numbers"),
        ({"bracket": (0.0, 0.8)}, "cannot begin its bracket at 0"),
        ({"iterations": 0}, "iterations and patience must be at least 1"),
        ({"patience": 0}, "iterations and patience must be at least 1"),
        ({"rounds": -1}, "rounds at least 0"),
        ({"rounding": 1.5}, "rounding is from 0 to 1"),
        ({"epsilon": -1.0}, "epsilon from 0 to below 1"),
        ({"damping": -0.1}, "damping must be at least 0, not -0.1"),
        ({"damping": float("nan")}, "damping must be at least 0, not nan"),
        ({"refit": -1}, "refit must be at least 0"),
        ({"per": "column"}, 'per is "row", "matrix"'),
        ({"init": torch.zeros(3, 24)}, "init has shape"),
        ({"init": torch.full((8, 24), float("nan"))}, "NaN or Inf"),
    ],
)
def test_mistakes(options, said):
    weight, stats, _ = problem()
    with pytest.raises(ValueError, match=said):
        fista(weight, stats, Unstructured(0.5), **options)
