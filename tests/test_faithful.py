"""What a review found not to be as it was promised, each with an oracle of its own."""

import pytest
import torch

from sparsekit.maths import NM, Stats, Unstructured, thinned
from sparsekit.solvers.alps import alps
from sparsekit.solvers.fista import fista
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda

GRID = (None, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def layer(out: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return torch.randn(out, width, generator=generator), torch.randn(tokens, width, generator=generator) @ mix


def exact(answer: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """The relative error in float64, from the tokens themselves."""
    given = inputs.double()
    return float(((answer - weight).double() @ given.t()).square().sum() / (weight.double() @ given.t()).square().sum())


@pytest.mark.parametrize("width", [64, 576, 4096, 11008, 14336])
def test_a_thinned_matrix_has_all_columns(width: int) -> None:
    rows = max(64, 2**21 // width)
    columns = torch.arange(width).expand(rows, width)
    counts = thinned(columns, 2**16).bincount(minlength=width)
    assert 2**15 < int(counts.sum()) <= 2**17 and int(counts.max() - counts.min()) <= 1


def test_fista_does_not_depend_on_the_order_of_columns() -> None:
    """Every fourth column is large, which a stride that shares a factor with the width sees always or never."""
    weight, inputs = layer(512, 512, 2048)
    inputs[:, ::4] *= 20
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    pattern = Unstructured(0.7)
    one = fista(weight, Stats.of(inputs), pattern)
    other = fista(weight[:, order].contiguous(), Stats.of(inputs[:, order]), pattern)
    errors = [exact(one, weight, inputs), exact(other, weight[:, order], inputs[:, order])]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (16, 64), (40, 48)])
@pytest.mark.parametrize("options", [{"polish": 60}, {"refit": 60}, {"polish": 60, "precondition": False}])
def test_fista_is_never_worse_than_its_start_without_a_ridge(pattern, tokens, width, options) -> None:
    """A Gram of low rank, where conjugate gradients converge and went on by their rounding errors."""
    weight, inputs = layer(24, width, tokens, seed=tokens)
    stats = Stats.of(inputs)
    begin = sparsegpt(weight, stats, pattern)
    answer = fista(weight, stats, pattern, begin, damping=0.0, **options)
    assert exact(answer, weight, inputs) <= exact(begin, weight, inputs) + 1e-6


def test_fista_keeps_a_start_that_has_the_pattern() -> None:
    """Wanda counts by row; rounding it once more by matrix would take weights by raw size from rows of small ones."""
    weight, inputs = layer(128, 128, 1024)
    inputs[:, :2] *= 300
    stats, pattern = Stats.of(inputs), Unstructured(0.7)
    begin = wanda(weight, stats, pattern, per="row")
    answer = fista(weight, stats, pattern, begin, rounds=0, refit=0, precondition=False, damping=0.0)
    torch.testing.assert_close(answer, begin)


def test_fista_does_not_depend_on_the_units_of_inputs() -> None:
    weight, inputs = layer(64, 64, 512)
    errors = [
        exact(fista(weight, Stats.of(inputs * scale), NM(2, 4), damping=0.0, refit=0), weight, inputs)
        for scale in (1.0, 1e-6, 1e4)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3) and errors[2] == pytest.approx(errors[0], rel=1e-3)


def test_refit_of_some_rows_is_that_of_all() -> None:
    """q, k and v in one linear or in three: each row ends by itself."""
    weight, inputs = layer(48, 64, 256)
    weight[:16] *= 100
    stats, pattern = Stats.of(inputs), NM(2, 4)
    begin = wanda(weight, stats, pattern)
    whole = refit(weight, stats, pattern, begin)
    parts = torch.cat([refit(w, stats, pattern, b) for w, b in zip(weight.split(16), begin.split(16), strict=True)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [alps, refit])
def test_damping_follows_the_tokens_an_input(solver) -> None:
    """Held-out error is near that of the best of a grid, whether tokens are few or many; a constant is not."""
    weight, every = layer(64, 128, 40960, seed=3)
    held = every[32768:]
    for tokens in (16, 64, 128, 256):
        stats = Stats.of(every[: tokens * 128])
        more = (wanda(weight, stats, NM(2, 4)),) if solver is refit else ()
        found = {d: exact(solver(weight, stats, NM(2, 4), *more, damping=d), weight, held) for d in GRID}
        assert found[None] <= 1.1 * min(found.values()), (tokens, found)
    assert found[None] < found[0.1]  # of 256 tokens an input


def test_a_ridge_by_column_is_not_made_by_a_few_huge_inputs() -> None:
    """One channel is ten thousand times larger on one token of 200: the mean of the diagonal is that channel."""
    weight, every = layer(256, 256, 1200, seed=4)
    inputs, held = every[:200].clone(), every[200:]
    inputs[7, 5] *= 10_000
    stats, pattern = Stats.of(inputs), Unstructured(0.6)
    by_mean, by_column = (
        exact(alps(weight, stats, pattern, ridge=ridge), weight, held) for ridge in ("mean", "column")
    )
    assert by_column < 0.8 * by_mean
    assert by_column < exact(wanda(weight, stats, pattern), weight, held)


def test_alps_of_a_gram_of_low_rank_without_damping() -> None:
    weight, inputs = layer(32, 64, 8)
    stats = Stats.of(inputs)
    for sparsity in (0.001, 0.5):
        assert alps(weight, stats, Unstructured(sparsity), damping=0.0).isfinite().all()
