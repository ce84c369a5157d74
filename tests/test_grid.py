"""Grids of a few bits: rounding by brute force over all levels, and what survives being saved in half precision."""

from itertools import product

import pytest
import torch

from sparsekit.maths import Grid, Quantization

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    Quantization(bits, group, symmetric)
    for bits, group, symmetric in product((2, 3, 4, 8), (4, 16, "channel"), (True, False))
]


def weight(out=40, width=32, size=1.0, seed=0):
    """Rows of very different size and mean, half of the weights zero."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=random) + torch.randn(out, 1, generator=random)
    weight *= size * torch.rand(out, 1, generator=random)
    return weight * (torch.rand(out, width, generator=random) > 0.5)


def points(grid):
    """Every value of the grid, (out, in / group, 2^bits), in float64."""
    levels = torch.arange(2**grid.bits, dtype=torch.float64)
    return (levels - grid.zero.double().unsqueeze(2)) * grid.scale.double().unsqueeze(2)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rounding_is_to_the_nearest_of_all_points_and_zero_is_one(kind, clip):
    dense = weight()
    grid = Quantization(kind.bits, kind.group, kind.symmetric, clip).fit(dense)
    rounded = grid.nearest(dense)
    near, groups = (matrix.double().view(40, -1, grid.group) for matrix in (rounded, dense))
    distance = (groups.unsqueeze(3) - points(grid).unsqueeze(2)).abs().amin(3)
    assert torch.equal((groups - near).abs(), distance)
    assert (points(grid) == 0).any(2).all() and (rounded[dense == 0] == 0).all()
    assert not torch.signbit(rounded[rounded == 0]).any()
    assert torch.equal(grid.values(grid.levels(dense)), rounded)
    nearest = grid.rounder()
    assert torch.equal(torch.stack([nearest(j, dense[:, j]) for j in range(32)], 1), rounded)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_range_covers_the_weights(kind):
    dense = weight()
    grid = kind.fit(dense)
    step = grid.scale.repeat_interleave(grid.group, 1)
    off = 0.51 + 2**kind.bits / (256 if not kind.symmetric else 512)  # half a step, and the rounding of the scale
    assert ((grid.nearest(dense) - dense).abs() <= step * off).all()


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_saved_is_what_the_grid_gives_in_that_dtype(kind, dtype, size):
    grid = kind.fit(weight(size=size))
    rounded = grid.nearest(weight(size=size))
    saved = rounded.to(dtype)
    steps = grid.levels(rounded).view(40, -1, grid.group) - grid.zero.unsqueeze(2)
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert torch.equal((steps.to(dtype) * grid.scale.unsqueeze(2).to(dtype)).view(40, 32), saved)
    assert grid.satisfied(saved) and torch.equal(grid.nearest(saved), saved)
    if not (dtype == torch.bfloat16 and kind.bits == 8 and not kind.symmetric):
        assert torch.equal(grid.levels(saved), grid.levels(rounded))
    found = kind.recover(saved)
    assert found.satisfied(saved) and torch.equal(found.nearest(saved), saved)
    assert (found.bits, found.group, found.symmetric) == (grid.bits, grid.group, grid.symmetric)
    assert found.zero.min() >= 0 and found.zero.max() <= 2**kind.bits - 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.bits < 8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_beside_the_grid_is_seen(kind, dtype):
    saved = kind.fit(weight()).nearest(weight()).to(dtype)
    column = int(saved[3].abs().argmin())
    saved[3, column] = saved[3].abs().max() * 0.4321
    assert not kind.fit(weight()).satisfied(saved)
    if kind.group == "channel":
        with pytest.raises(ValueError, match=rf"q_proj is on no .*{kind.bits}-bit grid .* 1 of 40 groups"):
            kind.recover(saved, "q_proj")


def test_the_dense_weight_is_on_no_grid():
    with pytest.raises(ValueError, match="is on no symmetric 4-bit grid of groups of 16"):
        Quantization(4, 16).recover(weight())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-30])
def test_constant_groups(kind, value):
    dense = torch.full((3, 16), value)
    rounded = kind.fit(dense).nearest(dense)
    assert rounded.isfinite().all()
    step = float(kind.fit(dense).scale.max())
    assert (rounded - dense).abs().max() <= step * 0.6 * (2 if kind.bits == 8 else 1)
    assert kind.recover(rounded).satisfied(rounded)


def test_clipping_lowers_the_squared_error_and_never_raises_it():
    dense = weight(width=64)
    dense[::2, 5] = 8
    for bits, symmetric in product((3, 4, 8), (True, False)):
        plain, clipped = (Quantization(bits, 32, symmetric, clip).fit(dense) for clip in (False, True))
        before, after = ((grid.nearest(dense) - dense).square().view(-1, 32).sum(1) for grid in (plain, clipped))
        assert (after <= before).all()
        assert after.sum() < before.sum() or bits == 8


def test_a_grid_by_hand():
    grid = Grid(2, False, 4, torch.tensor([[0.5]]), torch.tensor([[1.0]]))  # -0.5, 0, 0.5, 1
    assert grid.nearest(torch.tensor([[-3.0, -0.2, 0.6, 9.0]])).tolist() == [[-0.5, 0.0, 0.5, 1.0]]
    assert grid.group == 4


def test_mistakes():
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, not 9"):
        Quantization(9)
    with pytest.raises(ValueError, match="bits must be"):
        Quantization(True)
    with pytest.raises(ValueError, match='group must be a number of input columns or "channel", not 0'):
        Quantization(4, 0)
    with pytest.raises(ValueError, match="symmetric must be true or false, not 1"):
        Quantization(4, symmetric=1)
    with pytest.raises(ValueError, match=r"no option `bit`; did you mean `bits`\? \(valid: bits, group"):
        Quantization.of({"bit": 4})
    with pytest.raises(ValueError, match=r"576 input columns, which groups of 128 do not divide; .*: 96 and 144"):
        Quantization(4, 128).fit(torch.zeros(2, 576))
    with pytest.raises(ValueError, match=r"groups of 5000 do not divide; .*: 576; or"):
        Quantization(4, 5000).columns(576)
    assert Quantization.of(Quantization(3).settings()) == Quantization(3)
