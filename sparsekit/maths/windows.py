"""All but two of a group as overlapping windows of 2:4, so that what multiplies 2:4 multiplies 4:6, 6:8, 8:10 too."""

import torch
from torch import Tensor

from sparsekit.maths.pattern import NM


def slide(weight: Tensor, pattern: NM) -> Tensor:
    """A weight (out, in) whose groups keep all but two, as a 2:4 one (out, slid): slide(W) lift(x) = W x.

    A group of 2 N columns is N pairs, and window i of its N - 1 windows covers pairs i and i + 1: four columns, of
    which two stay. Pair by pair each window takes what the one before it left of the pair that they share, and fills up
    from the next. As a group keeps 2 (N - 1) weights at most, nothing is left over. Columns that do not fill a last
    group are padded with zeros to such windows, each with the two columns of one pair.

    Returns:
        (out, 4 (N - 1) groups + 4 pairs of the rest); every four of it have two zeros

    Raises:
        ValueError: the pattern is none of 4:6, 6:8, 8:10 ..., or the weight has not the pattern.

    Source: the windows of SlideSparse, which needs hardware for 2:4 alone.
    """
    _check(pattern)
    if not pattern.satisfied(weight):
        raise ValueError(f"the weight {tuple(weight.shape)} is not {pattern}")
    out, width = weight.shape
    pairs = pattern.group // 2
    whole = pattern.whole(width)
    groups = weight[:, :whole].reshape(out, -1, pairs, 2)  # (out, groups, pairs, 2)
    left = groups != 0  # not yet in a window
    windows = groups.new_zeros(out, groups.shape[1], pairs - 1, 4)
    for index in range(pairs - 1):
        here = left[:, :, index : index + 2].reshape(out, -1, 4)  # what is left of pair i comes first
        taken = here & (here.cumsum(2) <= 2)
        values = groups[:, :, index : index + 2].reshape(out, -1, 4)
        windows[:, :, index] = values.where(taken, 0)
        left[:, :, index : index + 2] &= ~taken.view(out, -1, 2, 2)
    assert not left.any()
    rest = weight[:, whole:]
    rest = torch.nn.functional.pad(rest, (0, rest.shape[1] % 2)).reshape(out, -1, 2)
    return torch.cat([windows.reshape(out, -1), torch.nn.functional.pad(rest, (0, 2)).reshape(out, -1)], 1)


def lift(inputs: Tensor, pattern: NM) -> Tensor:
    """Inputs (..., in) as a slid weight reads them (..., slid): the columns of every window, side by side.

    Raises:
        ValueError: see `slide`.
    """
    _check(pattern)
    width = inputs.shape[-1]
    whole, pairs = pattern.whole(width), pattern.group // 2
    starts = torch.arange(0, whole, pattern.group, device=inputs.device)[:, None] + torch.arange(
        0, 2 * (pairs - 1), 2, device=inputs.device
    )
    columns = (starts[..., None] + torch.arange(4, device=inputs.device)).flatten()
    rest = inputs[..., whole:]
    rest = torch.nn.functional.pad(rest, (0, rest.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return torch.cat([inputs[..., columns], torch.nn.functional.pad(rest, (0, 2)).flatten(-2)], -1)


def _check(pattern: NM) -> None:
    if not isinstance(pattern, NM) or not pattern.slides:
        raise ValueError(f"{pattern} is not all but two of an even group: 4:6, 6:8, 8:10 ... are windows of 2:4")
