import entrypoints
import pytest
import torch
from sparsekit.maths import NM, Stats, Unstructured
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import check_solver

from sparsekit_admm import admm


def problem(out=12, width=32, count=128, drift=0.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=dtype)

    x = normal(count, width) @ normal(width, width)
    return normal(out, width), x, (x + drift * x.std() * normal(count, width) if drift else None)


def slow_mask(score, pattern, progress, gradual):
    """Sorted; groups one after the other."""
    gone = torch.zeros_like(score, dtype=torch.bool)
    flat, total = gone.view(-1), score.numel()
    if isinstance(pattern, NM):
        losers = score.clone()
        for row in losers:
            for group in row.split(pattern.group):
                group[group.argsort(descending=True)[: pattern.kept]] = torch.inf
        flat[losers.view(-1).argsort()[: int(total * pattern.sparsity * progress)]] = True
    else:
        flat[score.view(-1).argsort()[: int(total * pattern.sparsity * (progress if gradual else 1))]] = True
    return ~gone


def slow(weight, x, dense, pattern, gradual):
    """Boza's iteration with the published settings, columns as there: W (in, out)."""
    gram = x.t() @ x
    norm = gram.diagonal().sqrt() + 1e-8
    gram = gram / norm / norm[:, None] + 0.1 * torch.eye(len(norm), dtype=gram.dtype)
    w0 = (weight * norm).t()
    xy = gram @ w0 + (0 if dense is None else ((x / norm).t() @ (dense - x) @ weight.t()))
    w, u = w0, torch.zeros_like(w0)
    for t in range(20):
        if t < 15:
            mask = slow_mask((w + u).t().abs().contiguous(), pattern, 1 - (1 - (t + 1) / 15) ** 3, gradual).t()
        z = (w + u) * mask
        u = u + w - z
        w = torch.linalg.solve(gram + torch.eye(len(gram), dtype=gram.dtype), xy + z - u)
    return ((w + u) * mask).t() / norm


def test_contract():
    check_solver(admm)


def test_installed_under_its_name():
    assert entrypoints.get_group_named("sparsekit.solvers")["admm"].load() is admm


@pytest.mark.parametrize("drift", [0.0, 0.2])
@pytest.mark.parametrize("gradual", [False, True])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.75), NM(2, 4), NM(1, 4), NM(4, 8)])
def test_reference(pattern, gradual, drift):
    weight, x, dense = problem(drift=drift)
    answer = admm(weight, Stats.of(x, dense), pattern, gradual=gradual)
    torch.testing.assert_close(answer, slow(weight, x, dense, pattern, gradual), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_more_iterations_reach_least_squares_on_the_mask(pattern):
    weight, x, _ = problem()
    answer = admm(weight, Stats.of(x), pattern, iterations=1000)
    norm = (x * x).sum(0).sqrt()
    scaled = x / norm
    gram = scaled.t() @ scaled + 0.1 * torch.eye(len(norm), dtype=x.dtype)
    for row, dense in zip(answer, weight, strict=True):
        kept = row != 0
        best = torch.linalg.solve(gram[kept][:, kept], (gram @ (dense * norm))[kept]) / norm[kept]
        torch.testing.assert_close(row[kept], best, rtol=1e-5, atol=1e-6)


def test_better_than_wanda_and_than_sparsegpt_on_its_tokens():
    weight, x, _ = problem(out=48, width=96, count=400, dtype=torch.float32)
    stats, pattern = Stats.of(x), Unstructured(0.5)
    error = stats.error(admm(weight, stats, pattern), weight)
    assert error < 0.5 * stats.error(wanda(weight, stats, pattern), weight)
    assert error < stats.error(sparsegpt(weight, stats, pattern), weight)


def test_mistakes():
    weight, x, _ = problem()
    with pytest.raises(ValueError, match="prune from 1 to iterations"):
        admm(weight, Stats.of(x), NM(2, 4), prune=30)
    with pytest.raises(ValueError, match="do not divide"):
        admm(weight, Stats.of(x), NM(2, 5))
