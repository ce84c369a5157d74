"""Sums on a device without float64, beside float64 and exact fractions."""

from fractions import Fraction

import pytest
import torch

from sparsekit.maths import double, home_of_double, row_totals, sums, total


@pytest.fixture
def without(monkeypatch):
    """The CPU as a device that has no float64."""
    monkeypatch.setattr(sums, "has_double", lambda device: False)


def hard(rows: int, count: int) -> torch.Tensor:
    """Numbers (rows, count) whose sums are small beside them: plain float32 keeps few of their digits."""
    random = torch.Generator().manual_seed(count)
    half = torch.randn(rows, count // 2, generator=random) * 1e6
    return torch.cat([half, -half * (1 + 1e-5 * torch.rand(half.shape, generator=random))], 1)


def exact(row: torch.Tensor) -> float:
    return float(sum(Fraction(each) for each in row.tolist()))


@pytest.mark.parametrize("count", [2, 6, 1000, 4098])
def test_compensated_sums_are_exact_to_float32s_last_digits(without, count):
    rows = hard(3, count)
    expected = torch.tensor([[exact(row)] for row in rows])
    assert row_totals(rows).dtype == torch.float32
    assert torch.allclose(row_totals(rows), expected, rtol=1e-6)
    assert float(total(rows)) == pytest.approx(exact(rows.flatten()), rel=1e-6)
    assert total(rows).dtype == torch.float64


def test_plain_float32_is_not_that_good():
    """Else the test above could not fail."""
    rows = hard(3, 4098)
    expected = torch.tensor([exact(row) for row in rows])
    assert (rows.sum(1) / expected - 1).abs().max() > 1e-4


def test_with_and_without_float64_it_is_the_same_number(monkeypatch):
    rows = hard(4, 300)
    assert row_totals(rows).dtype == torch.float64 and home_of_double(rows.device) == rows.device
    with_it = row_totals(rows), total(rows)
    monkeypatch.setattr(sums, "has_double", lambda device: False)
    torch.testing.assert_close(row_totals(rows).double(), with_it[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(total(rows), with_it[1], rtol=1e-6, atol=0.0)
    assert double(rows).dtype == torch.float64 and home_of_double(torch.device("mps")).type == "cpu"
