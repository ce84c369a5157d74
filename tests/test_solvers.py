"""The contract of every installed solver, and each of ours against a slow oracle in float64."""

import warnings
from functools import partial

import entrypoints
import pytest
import torch

from sparsekit.allocators.uniform import uniform
from sparsekit.maths import NM, Stats, Unstructured, chain, has_pattern, parse
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import PATTERNS, check_solver

INSTALLED = entrypoints.get_group_named("sparsekit.solvers")


def problem(out=6, width=32, count=96, seed=0, dtype=torch.float64, drift=0.0, correlation=1.0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=dtype)

    mix = correlation * normal(width, width) + (1 - correlation) * torch.eye(width, dtype=dtype)
    x = normal(count, width) @ mix
    dense = x + drift * x.std() * normal(count, width) if drift else None
    return normal(out, width), x, dense


def damped(gram, damping):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_contract(name, pattern):
    check_solver(INSTALLED[name].load(), patterns=[pattern])


# ---- the contract can be broken


def broken_in_place(weight, stats, pattern):
    """Prune in place."""
    return weight.mul_(pattern.keep(weight.abs()))


def broken_gram(weight, stats, pattern):
    """Damp the Gram in place."""
    stats.gram.diagonal().add_(1)
    return weight * pattern.keep(weight.abs())


def broken_dense(weight, stats, pattern):
    """Prune nothing."""
    return weight.clone()


def broken_threshold(weight, stats, pattern):
    """Remove everything up to a threshold, so all equal weights."""
    score = weight.abs()
    return weight * (score > score.flatten().sort().values[int(pattern.sparsity * score.numel())])


def broken_groups(weight, stats, pattern):
    """Right in number, wrong in place."""
    return weight * Unstructured(pattern.sparsity).keep(weight.abs())


def broken_random(weight, stats, pattern):
    """Different every time."""
    return weight * pattern.keep(torch.rand_like(weight))


def broken_double(weight, stats, pattern):
    """Another dtype."""
    return weight.double() * pattern.keep(weight.abs())


def broken_dead(weight, stats, pattern):
    """Divide by the input norm."""
    return (weight / stats.gram.diagonal()).masked_fill(~pattern.keep(weight.abs()), 0)


def broken_init(weight, stats, pattern, init=None):
    """Take init and look away."""
    return wanda(weight, stats, pattern)


def broken_positional(weight, stats, pattern, power=0.5):
    """An option that is not keyword-only."""
    return wanda(weight, stats, pattern)


def broken_required(weight, stats, pattern, *, power):
    """An option without a default."""
    return wanda(weight, stats, pattern)


def broken_silent(weight, stats, pattern):
    return wanda(weight, stats, pattern)


def broken_order(weight, pattern, stats):
    """Arguments the wrong way round."""
    return wanda(weight, stats, pattern)


@pytest.mark.parametrize(
    ("solver", "clause"),
    [
        (broken_in_place, "changed the weight in place"),
        (broken_gram, "changed the Gram in place"),
        (broken_dense, "fewer than"),
        (broken_threshold, "more than"),
        (broken_groups, "a group of 4 keeps more than 2"),
        (broken_random, "different answers"),
        (broken_double, "is torch.float64"),
        (broken_dead, "NaN or Inf"),
        (broken_init, "init makes no difference"),
        (broken_positional, "power is not keyword-only"),
        (broken_required, "power has no default"),
        (broken_silent, "no docstring"),
        (broken_order, "not weight, stats, pattern"),
    ],
)
def test_contract_names_what_is_broken(solver, clause):
    with pytest.raises(AssertionError, match=clause):
        check_solver(solver, patterns=["2:4"] if solver is broken_groups else ["50%"])


def test_contract_holds_for_compositions():
    check_solver(partial(sparsegpt, damping=0.1), patterns=["2:4"])
    check_solver(chain(wanda, refit), patterns=["50%"])


# ---- magnitude and wanda


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_against_brute_force(name, pattern):
    weight, x, _ = problem()
    pattern = parse(pattern)
    norms = [sum(float(t[j]) ** 2 for t in x) ** 0.5 if name == "wanda" else 1.0 for j in range(32)]
    score = [[abs(w) * n for w, n in zip(row, norms, strict=True)] for row in weight.tolist()]
    flat = [s for row in score for s in row]
    if isinstance(pattern, NM) and (pattern.pairs or pattern.slides):
        expected = weight.clone()
        unit = 2 if pattern.pairs else 1
        for row, scores in enumerate(score):
            for first in range(0, 32 - pattern.group + 1, pattern.group):  # what does not fill a group stays
                units = [range(i, i + unit) for i in range(first, first + pattern.group, unit)]
                units.sort(key=lambda columns, scores=scores: sum(scores[j] for j in columns))
                for columns in units[: (pattern.group - pattern.kept) // unit]:
                    expected[row, list(columns)] = 0
        answer = {"magnitude": magnitude, "wanda": wanda}[name](weight, Stats.of(x), pattern)
        assert torch.equal(answer, expected)
        return
    if isinstance(pattern, NM):
        size, count = pattern.group, pattern.group - pattern.kept
    elif name == "wanda":
        size, count = 32, pattern.pruned(32)
    else:
        size, count = len(flat), pattern.pruned(len(flat))
    expected = weight.clone().flatten()
    for first in range(0, len(flat), size):
        for i in sorted(range(first, first + size), key=flat.__getitem__)[:count]:
            expected[i] = 0
    answer = {"magnitude": magnitude, "wanda": wanda}[name](weight, Stats.of(x), pattern)
    assert torch.equal(answer.flatten(), expected)


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4"])
def test_wanda_by_share_against_the_published_search(pattern):
    """Its code halves alpha, the share of a row's sum that goes, until the sparsity is near; here counts are exact."""
    weight, x, _ = problem(seed=3)
    weight = weight * torch.linspace(0.2, 3, len(weight)).unsqueeze(1).exp()  # rows that are spread differently
    pattern, stats = parse(pattern), Stats.of(x)
    answer = wanda(weight, stats, pattern, per="share")
    if isinstance(pattern, NM):
        assert torch.equal(answer, wanda(weight, stats, pattern))
        return
    score = (weight.abs() * stats.squares.sqrt()).double()
    ordered, low, high = score.sort(1).values, 0.0, 1.0
    for _ in range(60):  # every row loses its lowest scores as long as their sum is at most alpha of all
        alpha = (low + high) / 2
        counts = (ordered.cumsum(1) <= alpha * ordered.sum(1, keepdim=True)).sum(1)
        low, high = (alpha, high) if counts.sum() <= pattern.pruned(score.numel()) else (low, alpha)
    counts = (ordered.cumsum(1) <= low * ordered.sum(1, keepdim=True)).sum(1)
    assert counts.sum() == pattern.pruned(score.numel()) and len(set(counts.tolist())) > 1
    for row, scores, count in zip(answer, score, counts, strict=True):
        assert set((row == 0).nonzero().flatten().tolist()) == set(scores.argsort()[:count].tolist())


@pytest.mark.parametrize("solver", [magnitude, wanda, partial(wanda, per=8), sparsegpt, partial(sparsegpt, block=4)])
@pytest.mark.parametrize("shape", [(24, 1), (1, 24)])
def test_a_single_row_or_column_loses_its_share_too(solver, shape):
    weight, inputs = torch.randn(shape), torch.randn(64, shape[1])
    answer = solver(weight, Stats.of(inputs), Unstructured(0.5))
    assert int((answer == 0).sum()) == 12 and has_pattern(answer, Unstructured(0.5))
    assert not has_pattern(weight, Unstructured(0.5))  # nothing pruned is not half


# ---- sparsegpt


def slow_sparsegpt(weight, hessian, choose, block):
    """OBS with an explicit inverse that is updated after every column, in the given precision."""
    answer, inverse = weight.clone(), torch.linalg.inv(hessian)
    mask = torch.zeros_like(weight, dtype=torch.bool)  # True: pruned
    for j in range(weight.shape[1]):
        if j % block == 0:
            mask[:, j : j + block] = choose(answer, inverse, j, min(j + block, weight.shape[1]))
        for row in range(len(weight)):
            if mask[row, j]:
                answer[row] -= answer[row, j] / inverse[j, j] * inverse[j]
        # remove column j from the problem: what is left of the inverse belongs to the later columns
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return answer.masked_fill(mask, 0)


def choose_by(pattern):
    def choose(answer, inverse, first, last):
        pivots, rest = [], inverse.clone()  # pivot j: the diagonal once the earlier columns are eliminated
        answer = answer.clone()
        for j in range(first, last):
            pivots.append(float(rest[j, j]))
            if isinstance(pattern, NM) and pattern.pairs and (j - first) % 2 == 0:  # the second without the first
                answer[:, j + 1] -= answer[:, j] / rest[j, j] * rest[j, j + 1]
            rest = rest - torch.outer(rest[:, j], rest[j]) / rest[j, j]
        score = answer[:, first:last] ** 2 / torch.tensor(pivots, dtype=answer.dtype)
        if isinstance(pattern, NM) and last - first < pattern.group:  # the columns that do not fill a last group
            return torch.zeros_like(score, dtype=torch.bool)
        return ~pattern.keep(score, per="matrix")

    return choose


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize(
    ("pattern", "block"), [("50%", 8), ("70%", 12), ("30%", 128), ("2:4", 4), ("4:8", 8), ("4:8p", 8), ("10:12", 12)]
)
def test_sparsegpt_against_slow_obs(pattern, block, drift):
    weight, x, dense = problem(width=40, count=80, drift=drift)
    stats, pattern = Stats.of(x, dense), parse(pattern)
    hessian, start = damped(x.t() @ x, 0.01), weight
    if dense is not None:
        ridge = (hessian - x.t() @ x).diagonal().diag()
        start = weight @ (dense.t() @ x + ridge) @ torch.linalg.inv(hessian)
    slow = slow_sparsegpt(start, hessian, choose_by(pattern), block)
    fast = sparsegpt(weight, stats, pattern, block=20 if isinstance(pattern, NM) else block)
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)
    single = Stats.of(x.float(), None if dense is None else dense.float())
    fast = sparsegpt(weight.float(), single, pattern, block=20 if isinstance(pattern, NM) else block)
    assert stats.error(fast.double(), weight) == pytest.approx(stats.error(slow, weight), rel=1e-3)


def test_sparsegpt_wider_than_a_block_and_a_single_row():
    weight, x, _ = problem(out=1, width=300, count=600)
    before = weight.clone()
    answer = sparsegpt(weight, Stats.of(x), Unstructured(0.6))
    slow = slow_sparsegpt(weight, damped(x.t() @ x, 0.01), choose_by(Unstructured(0.6)), 128)
    torch.testing.assert_close(answer, slow, rtol=1e-7, atol=1e-9)
    assert torch.equal(weight, before)


def test_sparsegpt_does_not_depend_on_the_scale_and_drops_dead_inputs():
    weight, x, _ = problem()
    x[:, [3, 17]] = 0
    answer = sparsegpt(weight, Stats.of(x), NM(2, 4))
    torch.testing.assert_close(sparsegpt(weight, Stats.of(1e-6 * x), NM(2, 4)), answer)
    assert not answer[:, [3, 17]].any()
    assert not sparsegpt(weight, Stats.of(0 * x), NM(2, 4)).any()


def test_sparsegpt_keeps_everything_at_zero_percent():
    weight, x, _ = problem()
    assert torch.equal(sparsegpt(weight, Stats.of(x), Unstructured(0)), weight)


def test_a_failed_cholesky_is_reported_every_time():
    stats = Stats.of(torch.randn(4, 32))
    stats.gram -= 0.05 * stats.gram.diagonal().mean() * torch.eye(32)  # indefinite until damping reaches 0.1
    for _ in range(2):  # the second from the cache
        with pytest.warns(UserWarning, match=r"no Cholesky factor with damping 0\.01; damping 0\.1 was used"):
            sparsegpt(torch.randn(6, 32), stats, NM(2, 4))
    stats.gram = -torch.ones(32, 32) - torch.eye(32)
    with pytest.raises(ValueError, match="positive semi-definite"):
        sparsegpt(torch.randn(6, 32), stats, NM(2, 4), damping=0.1)


def test_one_factor_serves_all_linears_of_one_input(monkeypatch):
    calls, weight, stats = [], torch.randn(6, 32), Stats.of(torch.randn(64, 32))
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or real(*a, **k))
    for pattern in PATTERNS:
        sparsegpt(weight, stats, parse(pattern))
    assert len(calls) == 1
    sparsegpt(weight, stats, NM(2, 4), damping=0.1)
    assert len(calls) == 2


# ---- refit


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1])
def test_refit_against_a_solve_per_row(damping, drift):
    weight, x, dense = problem(drift=drift)
    stats = Stats.of(x, dense)
    init = magnitude(weight, stats, Unstructured(0.6))
    init[2] = 0  # a row without support
    ridge = damping * stats.gram.diagonal().mean()
    expected = torch.zeros_like(weight)
    for row, support in enumerate(init != 0):
        # least squares on the support, the ridge as further rows of the design
        design = torch.cat([x[:, support], ridge.sqrt() * torch.eye(32, dtype=x.dtype)[:, support]])
        target = torch.cat([(x if dense is None else dense) @ weight[row], ridge.sqrt() * weight[row]])
        if support.any():
            expected[row, support] = torch.linalg.lstsq(design, target.unsqueeze(1)).solution.squeeze(1)
    answer = refit(weight, stats, Unstructured(0.6), init, damping=damping, iterations=2000, tolerance=0)
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(answer != 0, init != 0)


def test_refit_never_ends_above_its_start():
    weight, x, _ = problem(dtype=torch.float32)
    stats = Stats.of(x)
    hessian = damped(stats.gram, 0.1).double()

    def objective(v):
        return ((v - weight).double() @ hessian * (v - weight)).sum(1)

    for init in (sparsegpt(weight, stats, NM(2, 4)), wanda(weight, stats, NM(2, 4)), weight.clone()):
        best = refit(weight, stats, NM(2, 4), init, damping=0.1, iterations=500, tolerance=1e-7)
        for start in (init, best):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for iterations in (1, 5):
                    end = refit(weight, stats, NM(2, 4), start, damping=0.1, iterations=iterations, tolerance=0)
                    assert (objective(end) <= objective(start) * (1 + 1e-5) + 1e-9).all()


def test_refit_of_the_dense_weight_is_the_dense_weight():
    weight, x, _ = problem(dtype=torch.float32)
    assert torch.equal(refit(weight, Stats.of(x), Unstructured(0), weight), weight)


def test_refit_of_the_dense_weight_meets_a_dense_stream():
    """On the full support the answer is W + W drift_cross H^-1, also from W itself."""
    weight, x, dense = problem(drift=0.3)
    stats = Stats.of(x, dense)
    answer = refit(weight, stats, Unstructured(0), weight, damping=0.1, iterations=2000, tolerance=0)
    expected = weight + weight @ (dense - x).t() @ x @ torch.linalg.inv(damped(x.t() @ x, 0.1))
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


def test_refit_says_when_it_did_not_converge():
    weight, x, _ = problem()
    stats = Stats.of(x)
    init = wanda(weight, stats, NM(2, 4))
    with pytest.warns(UserWarning, match="stopped after 2 iterations"):
        refit(weight, stats, NM(2, 4), init, iterations=2, tolerance=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refit(weight, stats, NM(2, 4), init)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_refit_beats_obs_beats_the_mask(pattern, drift):
    weight, x, dense = problem(out=16, width=64, count=200, drift=drift, correlation=0.1)
    stats, pattern = Stats.of(x, dense), parse(pattern)
    updated = sparsegpt(weight, stats, pattern)
    masked = weight.masked_fill(updated == 0, 0)
    refitted = refit(weight, stats, pattern, masked, damping=1e-6, iterations=2000, tolerance=1e-9)
    errors = [stats.error(answer, weight) for answer in (refitted, updated, masked)]
    assert errors == sorted(errors) and errors[1] < 0.9 * errors[2]


# ---- chain, refusals, allocation


def test_chain_passes_answers_on_and_keeps_the_target():
    weight, x, _ = problem()
    stats, pattern = Stats.of(x), NM(2, 4)
    answer = chain(wanda, partial(refit, damping=0.0))(weight, stats, pattern)
    assert torch.equal(answer, refit(weight, stats, pattern, wanda(weight, stats, pattern), damping=0.0))
    assert stats.error(answer, weight) < stats.error(wanda(weight, stats, pattern), weight)
    nested = chain(wanda, chain(partial(refit, damping=0.0)))(weight, stats, pattern)
    assert torch.equal(nested, answer)
    init = magnitude(weight, stats, pattern)
    assert torch.equal(chain(refit)(weight, stats, pattern, init=init), refit(weight, stats, pattern, init))


def test_chain_refuses_what_would_be_lost():
    weight, x, _ = problem()
    stats, pattern = Stats.of(x), NM(2, 4)
    with pytest.raises(ValueError, match="at least one"):
        chain()
    with pytest.raises(ValueError, match=r"sparsegpt has no parameter init.*throw the earlier one away"):
        chain(wanda, partial(sparsegpt, damping=0.1))
    with pytest.raises(ValueError, match=r"chain\(wanda, refit\) has no parameter init"):
        chain(wanda, chain(wanda, refit))
    with pytest.raises(ValueError, match="refit needs an earlier answer"):
        chain(refit, refit)(weight, stats, pattern)
    with pytest.raises(ValueError, match="wanda has no parameter init"):
        chain(wanda, refit)(weight, stats, pattern, init=weight)


@pytest.mark.parametrize("solver", [magnitude, wanda, sparsegpt, partial(refit, init=torch.ones(6, 32))])
def test_solvers_refuse_what_does_not_fit(solver):
    stats = Stats.of(torch.randn(64, 32))
    with pytest.raises(ValueError, match="does not fit statistics of width 32"):
        solver(torch.randn(6, 30), stats, NM(2, 4))
    with pytest.raises(ValueError, match="the weight contains NaN or Inf"):
        solver(torch.full((6, 32), float("nan")), stats, NM(2, 4))
    stats.add(torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="activations entering this layer contain NaN or Inf"):
        solver(torch.ones(6, 32), stats, NM(2, 4))


@pytest.mark.parametrize("solver", [magnitude, wanda, sparsegpt])
def test_solvers_refuse_groups_that_do_not_divide(solver):
    with pytest.raises(ValueError, match="30 input columns"):
        solver(torch.randn(6, 30), Stats.of(torch.randn(64, 30)), NM(2, 4))


def test_options_out_of_range_are_refused():
    weight, stats = torch.randn(6, 32), Stats.of(torch.randn(64, 32))
    for options in ({"block": 0}, {"damping": -1.0}, {"damping": float("nan")}):
        with pytest.raises(ValueError, match="block must be at least 1"):
            sparsegpt(weight, stats, NM(2, 4), **options)
    for options in ({"damping": -1.0}, {"iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="must be at least"):
            refit(weight, stats, NM(2, 4), weight, **options)
    with pytest.raises(ValueError, match="init has shape"):
        refit(weight, stats, NM(2, 4), weight[:3])


def test_uniform():
    assert uniform({"a": 4, "b": 8}, 0.7) == {"a": 0.7, "b": 0.7}
