"""Pruning with quantization against optimal brain surgeon written out naively, with explicit inverses in float64."""

from functools import partial
from itertools import product

import pytest
import torch

from sparsekit.maths import NM, Quantization, Stats, Unstructured, chain, parse
from sparsekit.solvers.alps import alps
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.quantize import quantize
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.testing import check_solver

PATTERNS = ["50%", "2:4", "4:8"]
COMBINATIONS = list(product(PATTERNS, (3, 4, 8), (8, "channel"), (True, False)))


def problem(out=6, width=16, seed=0, dtype=torch.float64, drift=0.0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=random, dtype=dtype)
    x = x @ torch.randn(width, width, generator=random, dtype=dtype)
    dense = x + drift * x.std() * torch.randn(x.shape, generator=random, dtype=dtype) if drift else None
    return torch.randn(out, width, generator=random, dtype=dtype), x, dense


def damped(x, damping=0.01):
    gram = x.t() @ x
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def nearest(value, grid, row, column):
    """Of all points of the grid of one weight."""
    scale, zero = (float(part[row, column // grid.group]) for part in (grid.scale, grid.zero))
    return min(((level - zero) * scale for level in range(2**grid.bits)), key=lambda point: abs(point - value))


def naive(weight, hessian, grid, choose):
    """Column by column; the later weights of a row answer with -(w_j - q) H^-1[j, rest] / H^-1[j, j], H of the rest.

    choose(j, weight so far, the diagonal entries of the inverses): columns -> mask kept (out,), where it is decided.
    """
    weight, (out, width), masks = weight.clone(), weight.shape, {}
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(width):
        masks |= choose(j, weight, pivots)
        for row in range(out):
            point = nearest(weight[row, j], grid, row, j) if masks[j][row] else 0.0
            error = weight[row, j] - point
            weight[row, j + 1 :] -= error * inverses[j][0, 1:] / pivots[j]
            weight[row, j] = point
    return weight


@pytest.mark.parametrize(("pattern", "bits", "group", "symmetric"), COMBINATIONS)
def test_joint_is_the_naive_one(pattern, bits, group, symmetric):
    weight, x, _ = problem()
    pattern, settings = parse(pattern), {"bits": bits, "group": group, "symmetric": symmetric}
    grid = Quantization.of(settings).fit(weight)

    def choose(j, current, pivots):
        size = pattern.group if isinstance(pattern, NM) else 16  # the whole width is one block
        if j % size:
            return {}
        kept = pattern.keep(current[:, j : j + size] ** 2 / pivots[j : j + size], per="matrix")
        return {j + i: kept[:, i] for i in range(size)}

    answer = sparsegpt(weight, Stats.of(x), pattern, quantize=settings)
    assert torch.allclose(answer, naive(weight, damped(x), grid, choose), atol=1e-9)
    assert grid.satisfied(answer)
    assert pattern.satisfied(answer, per="matrix")


@pytest.mark.parametrize(("pattern", "bits", "group", "symmetric"), COMBINATIONS)
def test_quantize_on_a_support_is_the_naive_one(pattern, bits, group, symmetric):
    weight, x, _ = problem(seed=1)
    stats = Stats.of(x)
    init = alps(weight, stats, parse(pattern))
    kind = Quantization(bits, group, symmetric)
    answer = quantize(weight, stats, parse(pattern), init, bits=bits, group=group, symmetric=symmetric)
    expected = naive(init, damped(x), kind.fit(init), lambda j, *_: {j: init[:, j] != 0})
    assert torch.allclose(answer, expected, atol=1e-9)
    assert kind.fit(init).satisfied(answer) and (answer[init == 0] == 0).all()


def test_settled_blocks_are_least_squares_on_what_is_left(monkeypatch):
    weight, x, _ = problem(width=12)
    stats = Stats.of(x)
    init, hessian = magnitude(weight, stats, Unstructured(0.5)), damped(x)
    grid, kept = Quantization(3).fit(init), init != 0
    monkeypatch.setattr("sparsekit.solvers.quantize._BLOCK", 4)
    answer = quantize(weight, stats, Unstructured(0.5), init, bits=3, settle=200)
    expected = init.clone()
    for first in range(0, 12, 4):
        rest = expected[:, first:]
        expected[:, first:] = naive(
            rest,
            hessian[first:, first:],
            Quantization(3).fit(init),
            lambda j, *_, first=first: {j: kept[:, first + j] & (j < 4)},
        )
        expected[:, first + 4 :] = 0
        for row in range(len(weight)):  # what is rounded is fixed, what is kept of the rest is free
            free = kept[row].clone()
            free[: first + 4] = False
            gap = expected[row] - init[row]
            gap[free] = 0
            if free.any():
                inner, right = hessian[free][:, free], -(hessian @ gap)[free]
                expected[row, free] = init[row, free] + torch.linalg.solve(inner, right)
    assert torch.allclose(answer, expected, atol=1e-8)
    assert grid.satisfied(answer)


@pytest.mark.parametrize(("pattern", "bits", "group", "symmetric"), COMBINATIONS)
def test_zeros_survive_and_obs_beats_nearest(pattern, bits, group, symmetric):
    weight, x, dense = problem(out=48, width=160, dtype=torch.float32, drift=0.05)
    stats, settings = Stats.of(x, dense), {"bits": bits, "group": group, "symmetric": symmetric}
    init, pattern = sparsegpt(weight, stats, parse(pattern)), parse(pattern)
    answers = {
        method: quantize(weight, stats, pattern, init, method=method, **settings) for method in ("obs", "nearest")
    }
    joint = sparsegpt(weight, stats, pattern, quantize=settings)
    kind = Quantization.of(settings)
    for answer, start in ((answers["obs"], init), (answers["nearest"], init), (joint, weight)):
        assert kind.fit(start).satisfied(answer)
        assert pattern.satisfied(answer, per="matrix")
        assert not torch.signbit(answer[answer == 0]).any()
        for dtype in (torch.bfloat16, torch.float16):
            assert kind.fit(start).satisfied(answer.to(dtype))
    for answer in answers.values():
        assert (answer[init == 0] == 0).all()
    errors = {method: Stats.of(x).error(answer, init) for method, answer in answers.items()}
    assert errors["obs"] < 0.9 * errors["nearest"]


def test_nothing_changes_without_quantize():
    weight, x, dense = problem(out=24, width=160, dtype=torch.float32, drift=0.05)
    for pattern in PATTERNS:
        plain = sparsegpt(weight, Stats.of(x, dense), parse(pattern))
        assert torch.equal(sparsegpt(weight, Stats.of(x, dense), parse(pattern), quantize=None), plain)
        fine = sparsegpt(weight, Stats.of(x, dense), parse(pattern), quantize={"bits": 8})
        assert not torch.equal(fine, plain)
        assert Stats.of(x, dense).error(fine, weight) < 1.02 * Stats.of(x, dense).error(plain, weight)


@pytest.mark.parametrize("option", [{}, {"bits": 8, "group": 8, "symmetric": False}, {"bits": 8, "method": "nearest"}])
def test_contract_of_quantize(option):
    check_solver(partial(quantize, **option))


def test_a_pattern_of_zero_is_quantization_alone():
    weight, x, _ = problem(out=32, width=128, dtype=torch.float32)
    stats, settings = Stats.of(x), {"bits": 4, "group": 32}
    answer = sparsegpt(weight, stats, Unstructured(0), quantize=settings)
    grid = Quantization.of(settings).fit(weight)
    assert grid.satisfied(answer)
    assert stats.error(answer, weight) < 0.5 * stats.error(grid.nearest(weight), weight)


def test_continues_a_chain_and_is_reported_against_the_dense_weight():
    weight, x, _ = problem(out=32, width=128, dtype=torch.float32)
    stats, pattern = Stats.of(x), parse("2:4")
    four = partial(quantize, bits=4, group=32)
    answer = chain(magnitude, refit, four)(weight, stats, pattern)
    before = chain(magnitude, refit)(weight, stats, pattern)
    direct = (x @ (answer - weight).t()).square().sum() / (x @ weight.t()).square().sum()
    assert stats.error(answer, weight) == pytest.approx(float(direct), rel=1e-3)
    assert stats.error(before, weight) < stats.error(answer, weight)
    with pytest.raises(ValueError, match="cannot begin a chain"):
        chain(four)(weight, stats, pattern)


def test_inputs_that_are_always_zero():
    weight, x, _ = problem(out=32, width=32, dtype=torch.float32)
    x[:, 5] = 0
    stats, pattern = Stats.of(x), parse("2:4")
    init = magnitude(weight, stats, pattern)
    kind = Quantization(4, 8)
    answer = quantize(weight, stats, pattern, init, bits=4, group=8)
    assert torch.equal(answer[:, 5], kind.fit(init).nearest(init)[:, 5])
    assert (sparsegpt(weight, stats, pattern, quantize={"bits": 4})[:, 5] == 0).all()


def test_damping_that_had_to_be_raised_is_said():
    weight, x, _ = problem(dtype=torch.float32)
    stats = Stats.of(x[:3])
    with pytest.warns(UserWarning, match="no Cholesky factor with damping 0;"):
        quantize(weight, stats, parse("50%"), weight, damping=0.0)


def test_mistakes():
    weight, x, _ = problem()
    stats, pattern = Stats.of(x), parse("50%")
    with pytest.raises(ValueError, match="do not divide; the nearest that do: 4 and 8"):
        quantize(weight, stats, pattern, weight, group=5)
    with pytest.raises(ValueError, match=r"method must be .*, not 'gptq'"):
        quantize(weight, stats, pattern, weight, method="gptq")
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, not 16"):
        sparsegpt(weight, stats, pattern, quantize={"bits": 16})
    with pytest.raises(ValueError, match="no option `size`"):
        sparsegpt(weight, stats, pattern, quantize={"size": 16})
    with pytest.raises(ValueError, match="init has shape"):
        quantize(weight, stats, pattern, weight[:2])
