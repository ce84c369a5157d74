"""swaps against brute force over every swap and every mask, in float64."""

from itertools import combinations, product

import pytest
import torch

from sparsekit.maths import NM, Stats, Unstructured, chain
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.refit import refit
from sparsekit.solvers.swaps import swaps
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import check_solver


def problem(out=5, width=12, seed=0, drift=0.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, width, generator=random, dtype=dtype) @ torch.randn(width, width, generator=random, dtype=dtype)
    dense = x + drift * x.std() * torch.randn(x.shape, generator=random, dtype=dtype) if drift else None
    return torch.randn(out, width, generator=random, dtype=dtype), x, dense


def loss(row, kept, weight, x, dense):
    """Of one row, straight from the tokens."""
    return float(((x @ (weight[row] * kept)) - ((x if dense is None else dense) @ weight[row])).square().sum())


def neighbours(kept, group):
    """All masks one swap away."""
    for u, p in product((~kept).nonzero().flatten().tolist(), kept.nonzero().flatten().tolist()):
        if group is None or u // group == p // group:
            other = kept.clone()
            other[u], other[p] = True, False
            yield other


def test_contract():
    check_solver(swaps)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(1, 3)])
def test_first_swap_is_the_best_of_all(pattern, drift):
    weight, x, dense = problem(drift=drift)
    stats, init = Stats.of(x, dense), magnitude(weight, Stats.of(x), pattern, per="row")
    with pytest.warns(UserWarning, match="rows after 1 swaps"):
        answer = swaps(weight, stats, pattern, init, candidates=12, steps=1, tolerance=0)
    group = pattern.group if isinstance(pattern, NM) else None
    for row in range(len(weight)):
        masks = [init[row] != 0, *neighbours(init[row] != 0, group)]
        best = min(masks, key=lambda kept: loss(row, kept, weight, x, dense))
        assert torch.equal(answer[row], weight[row] * best)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_ends_where_no_swap_helps_and_near_the_best_mask(pattern, drift, seed):
    weight, x, dense = problem(width=8, seed=seed, drift=drift)
    init = wanda(weight, Stats.of(x), pattern)
    answer = swaps(weight, Stats.of(x, dense), pattern, init, candidates=8, tolerance=0)
    group = pattern.group if isinstance(pattern, NM) else None
    reached = lowest = 0.0
    for row in range(len(weight)):
        kept = answer[row] != 0
        mine = loss(row, kept, weight, x, dense)
        assert all(mine <= loss(row, other, weight, x, dense) * (1 + 1e-12) for other in neighbours(kept, group))
        masks = torch.zeros(70, 8, dtype=torch.bool)
        for mask, columns in zip(masks, combinations(range(8), 4), strict=True):
            mask[list(columns)] = True
        fitting = [mask for mask in masks if pattern.satisfied(mask[None].to(weight))]
        reached += mine
        lowest += min(loss(row, mask, weight, x, dense) for mask in fitting)
    assert lowest <= reached <= 1.25 * lowest


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_no_row_rises_and_counts_stay(candidates, pattern, drift):
    weight, x, dense = problem(out=20, width=64, drift=drift, dtype=torch.float32)
    stats = Stats.of(x, dense)
    init = wanda(weight, stats, pattern)
    answer = swaps(weight, stats, pattern, init, candidates=candidates)
    wide = [tensor.double() if tensor is not None else None for tensor in (weight, x, dense)]
    for row in range(len(weight)):
        assert loss(row, answer[row] != 0, *wide) <= loss(row, init[row] != 0, *wide) * (1 + 1e-6)
    assert stats.error(answer, weight) < 0.95 * stats.error(init, weight)
    assert torch.equal((answer != 0).sum(1), (init != 0).sum(1))
    assert pattern.satisfied(answer, per="row") and torch.equal(answer[answer != 0], weight[answer != 0])


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight, x, _ = problem(out=20, width=32)
    stats, pattern = Stats.of(x), Unstructured(0.5)
    init = wanda(weight, stats, pattern)
    whole = swaps(weight, stats, pattern, init)
    monkeypatch.setattr("sparsekit.solvers.swaps.PANEL", 3 * 32 * 4)
    assert torch.equal(swaps(weight, stats, pattern, init), whole)


def test_zero_weights_are_not_brought_back():
    weight, x, _ = problem()
    weight[:, :3] = 0
    stats, pattern = Stats.of(x), Unstructured(0.5)
    answer = swaps(weight, stats, pattern, wanda(weight, stats, pattern), tolerance=0)
    assert (answer != 0).sum(1).tolist() == [6] * 5


def test_continues_a_chain_only():
    weight, x, _ = problem(width=32)
    stats, pattern = Stats.of(x), Unstructured(0.5)
    better = chain(wanda, swaps, refit)(weight, stats, pattern)
    assert stats.error(better, weight) < stats.error(chain(wanda, refit)(weight, stats, pattern), weight)
    with pytest.raises(ValueError, match="cannot begin a chain"):
        chain(swaps)(weight, stats, pattern)


def test_mistakes():
    weight, x, _ = problem()
    stats, pattern = Stats.of(x), Unstructured(0.5)
    with pytest.raises(ValueError, match="init has shape"):
        swaps(weight, stats, pattern, weight[:2])
    with pytest.raises(ValueError, match="candidates and steps must be at least 1"):
        swaps(weight, stats, pattern, weight, candidates=0)
    with pytest.raises(ValueError, match="do not divide"):
        swaps(weight, stats, NM(2, 5), weight)
