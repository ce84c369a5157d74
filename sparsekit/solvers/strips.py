"""A strip of columns pruned one by one, the later ones making up for the earlier: one operator for torch.

Its plain form is a few small operators for each column, and is what runs on a CPU. On a card each of them would be a
launch that takes longer than its work, so on CUDA the operator is one kernel, in Triton, where that is installed.
"""

from typing import Any

import torch
from torch import Tensor

from sparsekit.maths import NM

WIDE = 32  # columns of a strip that the kernel takes, at most
TILE = 128  # outputs that one program of the kernel works on


def plain(columns: Tensor, upper: Tensor, scale: Tensor, errors: Tensor, kept: int, group: int) -> None:
    """Prune a strip of a weight in place; what its columns lose is in `errors`, for the columns behind it.

    columns: (strip, out), a column of the weight in each row. upper: (strip, strip), upper triangular: column j makes
        up for what column i before it lost by upper[i, j] of it
    scale: (strip, out), 1 / upper[j, j] where a weight goes, else 0; found here, group by group as each is reached,
        where `group` is not 0: the kept of each group that cost most stay, of equal ones the later
    errors: (strip, out), written
    """
    pattern = NM(kept, group) if group else None
    pivot = upper.diagonal().unsqueeze(1)
    for j in range(len(columns)):
        if pattern is not None and j % group == 0:
            here = slice(j, j + group)
            cost = (columns[here] / pivot[here]).square_()
            torch.div(pattern.lowest(cost), pivot[here], out=scale[here])
        error = torch.mul(columns[j], scale[j], out=errors[j])
        columns[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)


prune_strip = torch.library.custom_op("sparsekit::prune_strip", plain, mutates_args=("columns", "scale", "errors"))


@prune_strip.register_fake
def _(columns: Tensor, upper: Tensor, scale: Tensor, errors: Tensor, kept: int, group: int) -> None:
    return None


def kernel() -> Any:
    """The same as a kernel of Triton. ImportError where that is not installed."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def strip(  # type: ignore[no-untyped-def]
        columns,
        upper,
        scale,
        errors,
        out,
        count,
        column_stride,
        upper_stride,
        scale_stride,
        error_stride,
        STRIP: tl.constexpr,
        GROUP: tl.constexpr,
        GONE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = tl.arange(0, STRIP)
        mine = (row[:, None] < count) & (place[None, :] < out)
        weight = tl.load(columns + row[:, None] * column_stride + place[None, :], mask=mine, other=0.0)
        pivot = tl.load(upper + row * (upper_stride + 1), mask=row < count, other=1.0)
        lost = tl.zeros_like(weight)
        if GROUP == 0:
            gone = tl.load(scale + row[:, None] * scale_stride + place[None, :], mask=mine, other=0.0)
        else:
            gone = tl.zeros_like(weight)
        for j in tl.static_range(STRIP):
            if GROUP > 0 and j % GROUP == 0 and j + GROUP <= STRIP:
                ratio = weight / pivot[:, None]
                cost = ratio * ratio
                inside = (row >= j) & (row < j + GROUP)
                for i in tl.static_range(GROUP):
                    own = tl.sum(tl.where((row == j + i)[:, None], cost, 0.0), 0)
                    before = (cost < own[None, :]) | ((cost == own[None, :]) & (row < j + i)[:, None])
                    rank = tl.sum((inside[:, None] & before).to(tl.int32), 0)
                    goes = (row == j + i)[:, None] & (rank < GONE)[None, :]
                    gone = tl.where(goes, 1.0 / pivot[:, None], gone)
            at = (row == j)[:, None]
            error = tl.sum(tl.where(at, weight * gone, 0.0), 0)
            lost = tl.where(at, error[None, :], lost)
            share = tl.load(upper + j * upper_stride + row, mask=(row > j) & (row < count), other=0.0)
            weight = weight - share[:, None] * error[None, :]
        tl.store(columns + row[:, None] * column_stride + place[None, :], weight, mask=mine)
        tl.store(errors + row[:, None] * error_stride + place[None, :], lost, mask=mine)
        if GROUP > 0:
            tl.store(scale + row[:, None] * scale_stride + place[None, :], gone, mask=mine)

    return strip


def launch(strip: Any, columns: Tensor, upper: Tensor, scale: Tensor, errors: Tensor, kept: int, group: int) -> None:
    """Run the kernel on what `prune_strip` is given; wider strips and float64, which it cannot take, by `plain`."""
    count, out = columns.shape
    if count > WIDE or columns.dtype != torch.float32 or any(t.stride(1) != 1 for t in (columns, upper, scale, errors)):
        plain(columns, upper, scale, errors, kept, group)
        return
    strides = [tensor.stride(0) for tensor in (columns, upper, scale, errors)]
    sizes = {"STRIP": max(16, 1 << (count - 1).bit_length()), "GROUP": group, "GONE": group - kept, "TILE": TILE}
    strip[(-(-out // TILE),)](columns, upper, scale, errors, out, count, *strides, **sizes)


if torch.cuda.is_available():  # else nobody would run it
    try:
        _strip = kernel()
    except ImportError:
        pass
    else:

        @prune_strip.register_kernel("cuda")
        def _(columns: Tensor, upper: Tensor, scale: Tensor, errors: Tensor, kept: int, group: int) -> None:
            launch(_strip, columns, upper, scale, errors, kept, group)
