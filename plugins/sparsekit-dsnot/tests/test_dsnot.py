import entrypoints
import pytest
import torch
from sparsekit.maths import NM, Stats, Unstructured
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.wanda import wanda
from sparsekit.testing import check_solver

from sparsekit_dsnot import dsnot


def problem(out=12, width=32, count=128, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=random, dtype=dtype) + torch.randn(width, generator=random, dtype=dtype)
    x *= torch.rand(width, generator=random, dtype=dtype) + 0.1
    return torch.randn(out, width, generator=random, dtype=dtype), x


def slow(weight, x, init, group, tolerance, cycles=50):
    """Row by row, one weight at a time, with orders sorted once and pointers into them."""
    answer = weight.clone()
    mean, variance, norm = x.mean(0), x.var(0, unbiased=False), x.norm(dim=0)
    for row, w in enumerate(weight):
        pruned = set((init[row] == 0).nonzero().flatten().tolist())
        effect = (w * mean).tolist()
        urge, price = (w * mean / variance).tolist(), (w.abs() * norm).tolist()
        up, down = sorted(pruned, key=lambda j: -urge[j]), sorted(pruned, key=lambda j: urge[j])
        kept = sorted(set(range(len(w))) - pruned, key=lambda j: price[j])
        error = sum(effect[j] for j in pruned)
        start = error
        for _ in range(cycles):
            if abs(error) <= tolerance or (group and (error > 0) != (start > 0)):
                break
            order = up if error > 0 else down
            if not order or effect[order[0]] * error <= 0:
                break
            back = order.pop(0)
            fitting = [j for j in kept if effect[j] * error < 0 and (not group or j // group == back // group)]
            if not fitting:
                if group:
                    continue
                break
            kept.remove(fitting[0])
            pruned = pruned - {back} | {fitting[0]}
            error += effect[fitting[0]] - effect[back]
        answer[row, list(pruned)] = 0
    return answer


def test_contract():
    check_solver(dsnot)


def test_installed_under_its_name():
    assert entrypoints.get_group_named("sparsekit.solvers")["dsnot"].load() is dsnot


@pytest.mark.parametrize("tolerance", [5e-5, 0.3])
@pytest.mark.parametrize("start", [magnitude, wanda])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(1, 4)])
def test_reference(pattern, start, tolerance):
    weight, x = problem()
    stats = Stats.of(x)
    init = start(weight, stats, pattern)
    answer = dsnot(weight, stats, pattern, init, tolerance=tolerance)
    group = pattern.group if isinstance(pattern, NM) else None
    assert torch.equal(answer, slow(weight, x, init, group, tolerance))
    assert not torch.equal(answer, init)
    assert torch.equal((answer != 0).sum(1), (init != 0).sum(1))


def test_starts_from_wanda():
    weight, x = problem()
    stats, pattern = Stats.of(x), NM(2, 4)
    assert torch.equal(dsnot(weight, stats, pattern), dsnot(weight, stats, pattern, wanda(weight, stats, pattern)))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_mean_output_comes_back(pattern):
    """On wide rows; in a narrow one the weights run out before the error is small."""
    weight, x = problem(out=40, width=512)
    stats = Stats.of(x)
    answers = wanda(weight, stats, pattern), dsnot(weight, stats, pattern)
    before, after = (float(((answer - weight) @ x.mean(0)).abs().mean()) for answer in answers)
    assert after < 0.4 * before


def test_inputs_that_never_change():
    weight, x = problem(dtype=torch.float32)
    x[:, 3], x[:, 7] = 0, 2.5
    for pattern in (Unstructured(0.5), NM(2, 4)):
        answer = dsnot(weight, Stats.of(x), pattern)
        assert answer.isfinite().all() and (answer == 0).sum() == answer.numel() // 2
    still = dsnot(weight, Stats.of(torch.zeros(4, 32)), Unstructured(0.5))
    assert (still == 0).sum() == still.numel() // 2


def test_mistakes():
    weight, x = problem()
    with pytest.raises(ValueError, match="init has shape"):
        dsnot(weight, Stats.of(x), NM(2, 4), weight[:2])
    with pytest.raises(ValueError, match="cycles must be at least 1"):
        dsnot(weight, Stats.of(x), NM(2, 4), cycles=0)
