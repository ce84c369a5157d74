import doctest
from itertools import pairwise

import pytest
import torch

import sparsekit.maths.norms
import sparsekit.maths.statistics
from sparsekit.maths import Norms, Stats


def tokens(count=200, width=12, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=random, dtype=dtype)
    return torch.randn(count, width, generator=random, dtype=dtype) @ mix


def test_doctests():
    assert doctest.testmod(sparsekit.maths.statistics).failed == 0
    assert doctest.testmod(sparsekit.maths.norms).failed == 0


def test_norms_are_the_diagonal_of_the_gram():
    x, dense = tokens(), tokens(seed=1)
    stats, norms = Stats(12, dtype=torch.float64), Norms(12, dtype=torch.float64)
    for each in (stats, norms):
        each.add(x[:60].reshape(3, 20, 12))
        each.add(x[60:], dense[60:])
    torch.testing.assert_close(norms.squares, stats.gram.diagonal())
    torch.testing.assert_close(stats.squares, stats.gram.diagonal())
    torch.testing.assert_close(norms.mean, stats.mean)
    assert (norms.count, norms.width) == (stats.count, stats.width)
    assert not hasattr(norms, "gram")


@pytest.mark.parametrize("drift", [False, True])
def test_few_tokens_give_the_exact_error(drift):
    random = torch.Generator().manual_seed(2)
    x = tokens(150)
    dense = x + 0.1 * tokens(150, seed=3) if drift else None
    weight = torch.randn(7, 12, generator=random, dtype=torch.float64)
    pruned = weight * (torch.rand(7, 12, generator=random) > 0.5)
    stats, norms = Stats.of(x, dense), Norms.of(x, dense)
    assert norms.error(pruned, weight) == pytest.approx(stats.error(pruned, weight))
    assert norms.energy(weight) == pytest.approx(stats.energy(weight))
    assert Norms.of(torch.zeros_like(x)).error(pruned, weight) == 0


def test_wide_layers_are_estimated_and_narrow_ones_exact():
    random = torch.Generator().manual_seed(6)
    for width in (64, 1056):
        x = torch.randn(4000, width, generator=random) * torch.rand(width, generator=random)
        weight = torch.randn(8, width, generator=random)
        pruned = weight * (torch.rand(8, width, generator=random) > 0.5)
        stats = Stats.of(x)
        exact, estimate = stats.error(pruned, weight), stats.estimate(pruned, weight)
        assert (exact == estimate) == (width == 64)
        assert estimate == pytest.approx(exact, rel=0.1)


def test_many_tokens_give_an_estimate_from_all_over():
    x, weight = tokens(20_000), tokens(7, seed=4)
    pruned = weight * (torch.rand(7, 12, generator=torch.Generator().manual_seed(5)) > 0.5)
    norms = Norms(12, dtype=torch.float64)
    for chunk in x.split(333):
        norms.add(chunk)
    kept = torch.cat([rows for rows, _ in norms._sample])
    assert 512 <= len(kept) <= 1024
    places = [int((x == row).all(1).nonzero()) for row in kept]
    steps = {b - a for a, b in pairwise(places)}
    assert len(steps) == 1 and places[-1] > 19_000  # evenly, to the end
    assert norms.error(pruned, weight) == pytest.approx(Stats.of(x).error(pruned, weight), rel=0.15)


def test_sums_against_direct_products_in_batches():
    x, dense = tokens(), tokens(seed=1)
    stats = Stats(12, dtype=torch.float64)
    stats.add(x[:60].reshape(3, 20, 12), dense[:60].reshape(3, 20, 12))
    stats.add(x[60:], dense[60:])
    torch.testing.assert_close(stats.gram, x.t() @ x)
    torch.testing.assert_close(stats.cross, dense.t() @ x)
    torch.testing.assert_close(stats.dense_gram, dense.t() @ dense)
    torch.testing.assert_close(stats.mean, x.mean(0))
    assert stats.count == 200 and stats.width == 12


def test_padding_is_no_token():
    x = tokens()
    padded = Stats.of(torch.cat([x, torch.zeros(50, 12, dtype=x.dtype)]))
    assert padded.count == 200
    torch.testing.assert_close(padded.mean, x.mean(0))
    assert Stats(12).count == 0 and Stats(12).mean.isfinite().all()


def test_types():
    assert Stats.of(tokens()).gram.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Stats.of(tokens().to(dtype)).gram.dtype == torch.float32


@pytest.mark.parametrize("drift", [None, 1.0, 1e-3])
def test_error_and_energy_against_direct_computation(drift):
    x = tokens()
    dense = x if drift is None else x + drift * tokens(seed=1)
    weight = torch.randn(5, 12, dtype=x.dtype)
    answer = weight * (torch.rand_like(weight) > 0.5)
    stats = Stats.of(x, None if drift is None else dense)
    energy = ((dense @ weight.t()) ** 2).sum()
    error = ((x @ answer.t() - dense @ weight.t()) ** 2).sum()
    assert stats.energy(weight) == pytest.approx(float(energy), rel=1e-10)
    assert stats.error(answer, weight) == pytest.approx(float(error / energy), rel=1e-10)
    assert stats.error(answer, weight, energy=2 * float(energy)) == pytest.approx(float(error / energy) / 2, rel=1e-10)
    torch.testing.assert_close(stats.target(weight), weight @ dense.t() @ x)


def test_a_small_drift_survives_float32():
    """With sum x_d x' and sum x_d x_d' in float32 the error of the dense weight, 1e-8 here, would drown in rounding."""
    x, delta = tokens(), 1e-4 * tokens(seed=1)
    weight = torch.randn(5, 12, dtype=x.dtype)
    exact = ((delta @ weight.t()) ** 2).sum() / (((x + delta) @ weight.t()) ** 2).sum()
    stats = Stats(12)
    stats.gram, stats.total = (x.t() @ x).float(), x.sum(0).float()
    stats.drift_cross, stats.drift_gram = (delta.t() @ x).float(), (delta.t() @ delta).float()
    assert stats.error(weight.float(), weight.float()) == pytest.approx(float(exact), rel=1e-4)
    cross, dense_gram, w = stats.cross, stats.dense_gram, weight.float()
    naive = (w @ stats.gram * w).sum() - 2 * (w @ cross * w).sum() + (w @ dense_gram * w).sum()
    assert abs(float(naive) / stats.energy(w) - float(exact)) > 0.5 * float(exact)


def test_error_without_energy():
    stats, weight = Stats.of(torch.zeros(4, 3)), torch.ones(2, 3)
    assert stats.error(weight, weight) == 0
    stats = Stats.of(torch.tensor([[1.0, 0.0]]))
    assert stats.error(torch.ones(1, 2), torch.tensor([[0.0, 1.0]])) == float("inf")


def test_cache_lasts_until_more_is_added():
    stats, calls = Stats.of(tokens()), []
    for _ in range(2):
        assert stats.cached("key", lambda: calls.append(1) or len(calls)) == 1
    stats.add(tokens())
    assert stats.cached("key", lambda: calls.append(1) or len(calls)) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_named(bad):
    x = tokens()
    Stats.of(x).check("q_proj")
    broken = x.clone()
    broken[7, 3] = bad
    with pytest.raises(
        ValueError, match=r"^activations entering model.q_proj contain NaN or Inf, or .* \(1 of 12 columns\)"
    ):
        Stats.of(broken).check("model.q_proj")
    with pytest.raises(ValueError, match="the dense model's activations entering q_proj"):
        Stats.of(x, broken).check("q_proj")


def test_mistakes_are_answered():
    stats = Stats(12)
    with pytest.raises(ValueError, match="width 11 do not fit statistics of width 12"):
        stats.add(torch.rand(3, 11))
    with pytest.raises(ValueError, match="not of the inputs' shape"):
        stats.add(torch.rand(3, 12), torch.rand(2, 12))
    with pytest.raises(ValueError, match=r"must be \(out, 12\)"):
        stats.check_weight(torch.rand(12, 5))
    with pytest.raises(ValueError, match="NaN or Inf"):
        stats.check_weight(torch.full((2, 12), float("inf")))


def test_inputs_and_their_graph_are_left_alone():
    x = tokens().requires_grad_()
    before = x.detach().clone()
    stats = Stats.of(x, x * 2)
    assert not stats.gram.requires_grad and not stats.drift_gram.requires_grad
    assert torch.equal(x, before)


def test_a_ridge_between_the_mean_and_each_input():
    """By formula: d times the root of an input's energy and the geometric mean; inputs that never were have none."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=random) * torch.tensor([0.0, 0.1, 1.0, 1.0, 5.0, 30.0])
    stats = Stats.of(inputs)
    energy = inputs.square().sum(0)
    typical = energy[1:].log().mean().exp()
    torch.testing.assert_close(stats.ridge(by="root"), 2 * 6 / 40 * (energy * typical).sqrt())
    assert float(Stats.of(inputs[:3]).ridge(by="root").max()) == float((Stats.of(inputs[:3]).ridge(1.0, "root")).max())
    few, many = (stats.ridge(by=by)[1:] / energy[1:] for by in ("root", "mean"))
    assert float(few.max() / few.min()) < float(many.max() / many.min())
