"""Integer grids for weights: a few bits a weight, one scale for each group of input columns, and zero always on it.

A grid has 2^bits levels q = 0, 1, ...; level q stands for (q - zero) * scale. Zero is a level of every grid, so pruned
weights stay exactly zero. A symmetric grid has zero = 2^(bits - 1), so that q - zero is -2^(bits - 1) ... 2^(bits - 1)
- 1; of an asymmetric one zero is any level, and its range includes 0.

Scales have eight significant bits and the range of float16, so float16, bfloat16 and float32 all hold them exactly, and
(q - zero) * scale is exact in float32. What is guaranteed: a weight of a grid that is saved in any of the three, that
is, rounded to it once, is bit for bit what (q - zero) * scale gives in that dtype; and the levels of what was saved
stand for it again, bit for bit. They are the same q, but for asymmetric grids of 8 bits in bfloat16, where two
neighbouring levels may be one number.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

_SMALLEST = 2.0**-24  # of float16; also the scale of a group of zeros
_NORMAL = 2.0**-14  # from here on float16 has the eight bits of bfloat16
_PROBE = 32  # columns that are looked at first
_CLIPS = 20  # fractions of the range that the search for the best clipping tries, down to a half


@dataclass(frozen=True)
class Grid:
    """The grid of one weight (out, in): scale and zero (out, in / group), both float32, zero with whole numbers."""

    bits: int
    symmetric: bool
    width: int
    scale: Tensor
    zero: Tensor

    @property
    def group(self) -> int:
        """Input columns that share a scale."""
        return self.width // self.scale.shape[1]

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest level of every weight (out, in), in the same shape, as float32; of a tie the even q - zero.

        Of a weight in bfloat16 or float16 that is a level rounded to its dtype, that level.
        """
        steps = _steps(self._groups(weight), self.scale.unsqueeze(2))
        return steps.add_(self.zero.unsqueeze(2)).clamp_(0, 2**self.bits - 1).reshape(weight.shape)

    def values(self, levels: Tensor) -> Tensor:
        """What levels (out, in) stand for, in float32."""
        return ((self._groups(levels).float() - self.zero.unsqueeze(2)) * self.scale.unsqueeze(2)).reshape(levels.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """Round to nearest: the weight (out, in) of this grid, in the weight's dtype."""
        return self.values(self.levels(weight)).to(weight.dtype)

    def rounder(self) -> Callable[[int, Tensor], Tensor]:
        """Round to nearest column by column: `nearest(j, column)` of input column j (out,), in the column's dtype."""
        scale, low = self.scale.t().contiguous(), -self.zero.t().contiguous()  # (in / group, out)
        high, group = low + (2**self.bits - 1), self.group

        def nearest(j: int, column: Tensor) -> Tensor:
            step = scale[j // group]
            return (column / step).round_().clamp_(low[j // group], high[j // group]).add_(0.0).mul_(step)  # no -0.0

        return nearest

    def satisfied(self, weight: Tensor) -> bool:
        """Whether every weight (out, in) is, bit for bit, a value of this grid in the weight's dtype."""
        return bool((self.nearest(weight) == weight).all())

    def _groups(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), -1, self.group)


@dataclass(frozen=True)
class Quantization:
    """How a weight gets its grid; the keys are the options of a recipe.

    bits: 2 to 8.
    group: input columns that share a scale, a divisor of the width; "channel": the whole row.
    symmetric: zero in the middle, or a zero point for each group.
    clip: the range of a group, with which its scale is made, is that of the weights (false), or the fraction of it,
        from a half, with the least mean squared error of rounding to nearest (true).

    >>> grid = Quantization(bits=3, group=4).fit(torch.tensor([[0.7, 0.0, -0.35, 0.12]]))
    >>> grid.scale, grid.levels(torch.tensor([[0.7, 0.0, -0.35, 0.12]])) - grid.zero
    (tensor([[0.2002]]), tensor([[ 3.,  0., -2.,  1.]]))
    """

    bits: int = 8
    group: int | Literal["channel"] = "channel"
    symmetric: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be a whole number from 2 to 8, not {self.bits!r}")
        if self.group != "channel" and (type(self.group) is not int or self.group < 1):
            raise ValueError(f'group must be a number of input columns or "channel", not {self.group!r}')
        for name in ("symmetric", "clip"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, settings: "Mapping[str, Any] | Quantization") -> "Quantization":
        """From a recipe's mapping. Raises ValueError for an unknown key and for values out of range."""
        if isinstance(settings, Quantization):
            return settings
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ValueError(f"quantize has no option `{name}`; {hint}(valid: {', '.join(known)})")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """The mapping that `of` reads."""
        return asdict(self)

    def columns(self, width: int, name: str = "this layer") -> int:
        """Columns of a group in a layer of `width` input columns. Raises ValueError when the group does not divide."""
        if self.group == "channel":
            return width
        if width % self.group:
            fitting = [size for size in range(1, width + 1) if width % size == 0]
            below = max(size for size in fitting if size <= self.group)
            near = [below, *[size for size in fitting if size > below][:1]]
            raise ValueError(
                f"{name} has {width} input columns, which groups of {self.group} do not divide; "
                f'the nearest that do: {" and ".join(map(str, near))}; or group "channel", one for each row'
            )
        return self.group

    @torch.no_grad()
    def fit(self, weight: Tensor) -> Grid:
        """The grid of a finite weight (out, in). Raises ValueError when the group does not divide its width."""
        groups = weight.float().reshape(len(weight), -1, self.columns(weight.shape[1]))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)  # (out, in / group)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        best = self._grid(low, high, weight.shape[1])
        if not self.clip:
            return best
        least = (best.nearest(weight).sub_(weight)).square_().view_as(groups).sum(2)
        for step in range(1, _CLIPS + 1):
            part = 1 - step / (2 * _CLIPS)
            grid = self._grid(low * part, high * part, weight.shape[1])
            error = (grid.nearest(weight).sub_(weight)).square_().view_as(groups).sum(2)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
            best = Grid(self.bits, self.symmetric, weight.shape[1], scale, zero)
        return best

    def _fits(self, groups: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Which groups (n, columns) are whole numbers of their step (n, 1), within the range; and the lowest number."""
        levels, half = _steps(groups, step), 2 ** (self.bits - 1)
        low, high = levels.amin(1).clamp_(max=0), levels.amax(1).clamp_(min=0)
        inside = (low >= -half) & (high < half) if self.symmetric else high - low < 2 * half
        return inside & (levels * step).to(groups.dtype).eq(groups).all(1), low

    def _grid(self, low: Tensor, high: Tensor, width: int) -> Grid:
        top = 2**self.bits - 1
        scale = _short((high - low) / top)
        middle = torch.full_like(scale, 2 ** (self.bits - 1))
        zero = middle if self.symmetric else (-low / scale).round_().clamp_(0, top)
        return Grid(self.bits, self.symmetric, width, scale, zero)

    @torch.no_grad()
    def recover(self, weight: Tensor, name: str = "this layer") -> Grid:
        """A grid that holds `weight` (out, in) bit for bit in its dtype, from the weight alone, as a checkpoint has it.

        The largest |weight| of a group is k steps, k = 1 ... 2^bits - 1. Each k leaves one scale of eight significant
        bits, three for a weight in bfloat16, to be tried on the whole group, the largest k first. The scale need not be
        the one that the weight was made with (of a group on every second level there are two); the values are.

        Raises ValueError, with the number of groups, when a group is on no grid.
        """
        count = self.columns(weight.shape[1], name)
        groups = weight.reshape(-1, count)  # (out * in / group, group)
        largest = groups.abs().amax(1).float()
        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        scale, zero = torch.full_like(largest, _SMALLEST), torch.full_like(largest, half)
        left = largest.nonzero().squeeze(1)
        shifts = (0, 1, -1) if weight.dtype == torch.bfloat16 else (0,)
        for steps, shift in product(range(half if self.symmetric else top, 0, -1), shifts):
            if not len(left):
                break
            step = _short(largest[left] / steps, shift).unsqueeze(1)
            fits, _ = self._fits(groups[left, :_PROBE], step)  # nearly all that are not on this grid end here
            likely, step = left[fits], step[fits]
            whole, low = self._fits(groups[likely], step)
            scale[likely[whole]] = step[whole].squeeze(1)
            if not self.symmetric:
                zero[likely[whole]] = -low[whole]
            fits = fits.masked_scatter(fits, whole)
            left = left[~fits]
        if len(left):
            kind = "symmetric" if self.symmetric else "asymmetric"
            raise ValueError(
                f"{name} is on no {kind} {self.bits}-bit grid of groups of {count}: "
                f"{len(left):,} of {len(groups):,} groups are not"
            )
        shape = (len(weight), weight.shape[1] // count)
        return Grid(self.bits, self.symmetric, weight.shape[1], scale.view(shape), zero.view(shape))


def _short(scale: Tensor, shift: int = 0) -> Tensor:
    """Rounded to what bfloat16 and float16 both hold, and not 0, or `shift` numbers after it; float32 in and out."""
    scale = (scale.bfloat16().view(torch.int16) + shift).view(torch.bfloat16).float()
    return torch.where(scale < _NORMAL, scale.half().float(), scale).clamp_(min=_SMALLEST)


def _steps(weight: Tensor, scale: Tensor) -> Tensor:
    """How many steps from zero every weight is, rounded to the nearest, as float32; the two must broadcast.

    In bfloat16 more than 128 steps may have been rounded by up to one, and two numbers of steps be one number: the
    smaller is taken, so that no range grows.
    """
    steps = (weight.float() / scale).round_()
    if weight.dtype == torch.bfloat16:
        far, toward = steps.abs() > 128, steps.sign()
        if far.any():
            inner, same = steps - toward, (steps * scale).to(weight.dtype) == weight
            fits = (inner * scale).to(weight.dtype) == weight
            steps = torch.where(far & fits, inner, torch.where(far & ~same, steps + toward, steps))
    return steps


def ends_on_grid(settings: Callable[[Mapping[str, Any]], "Mapping[str, Any] | None"]) -> Callable[[Any], Any]:
    """Declare that a solver's answers lie on a grid: `@ends_on_grid(lambda options: options["quantize"])`.

    settings: from all of the solver's options, those of `Quantization`; None where these options quantize nothing
    """

    def grid(options: Mapping[str, Any]) -> Quantization | None:
        found = settings(options)
        return None if found is None else Quantization.of(found)

    def mark(solver: Any) -> Any:
        solver.grid = grid
        return solver

    return mark
