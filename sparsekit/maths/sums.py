"""Sums that keep what float32 would lose: in float64 where a device has it, else with their rounding errors made up."""

from functools import lru_cache

import torch
from torch import Tensor


def total(x: Tensor) -> Tensor:
    """The sum of all entries, a float64 number: on their device, or on the CPU if that has no float64.

    >>> total(torch.tensor([1e8, 1.0, -1e8]))
    tensor(1., dtype=torch.float64)
    """
    if has_double(x.device):
        return x.sum(dtype=torch.float64)
    high, low = _compensated(x.reshape(1, -1))
    return torch.stack([high, low]).cpu().double().sum()


def row_totals(x: Tensor) -> Tensor:
    """The sums of the rows of (rows, n), (rows, 1), on their device: float64, or float32 if it has no float64."""
    if has_double(x.device):
        return x.sum(1, keepdim=True, dtype=torch.float64)
    high, low = _compensated(x)
    return (high + low).unsqueeze(1)


def double(x: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU if that has no float64."""
    return x.double() if has_double(x.device) else x.cpu().double()


def home_of_double(device: torch.device) -> torch.device:
    """Where float64 numbers of what a device computes are kept: there, or on the CPU."""
    return device if has_double(device) else torch.device("cpu")


def has_double(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's and some of Intel's do not."""
    return device.type in ("cpu", "cuda", "meta") or _tried(device)


@lru_cache
def _tried(device: torch.device) -> bool:
    try:
        torch.ones((), device=device, dtype=torch.float64)
    except (RuntimeError, TypeError):  # as torch's backends say it
        return False
    return True


def _compensated(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of rows (rows, n) by halves, and apart from them (rows,) what rounding took: Knuth's two-sum at each."""
    low = x.new_zeros(len(x))
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat([x, x.new_zeros(len(x), 1)], 1)
        a, b = x.tensor_split(2, 1)
        both = a + b
        part = both - a
        low = low + ((a - (both - part)) + (b - part)).sum(1)
        x = both
    return x.sum(1), low
