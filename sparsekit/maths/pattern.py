"""Which weights go: unstructured sparsity and n:m groups.

A pattern turns a score into a mask. Counts are exact, also among equal scores, and never more than was asked for.
"""

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["row", "matrix"] | int  # an int: blocks of that many columns, all rows jointly
SMALLEST = 16  # columns of a single row that weights compete in, at least
_PAIRWISE = 16  # up to this group, comparing all pairs beats selecting


@dataclass(frozen=True)
class Unstructured:
    """Remove the fraction `sparsity` of the weights, wherever they are: 0 <= sparsity < 1.

    >>> Unstructured(0.5).keep(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
    tensor([[False,  True,  True, False]])
    >>> str(Unstructured(0.625))
    '62.5%'

    rows: factors of a linear's rows, by which their weights count more where a solver weighs rows against one another,
        see `row_factors`; empty: alike
    """

    sparsity: float
    rows: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", float(self.sparsity) + 0.0)  # -0.0 becomes 0.0
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is the fraction removed, from 0 up to but not including 1; {self.sparsity} is not"
            )

    def scale(self, weight: Tensor) -> Tensor | None:
        """What the rows of a weight (out, in) are multiplied by while it is solved (out, 1); None: by nothing."""
        if not self.rows:
            return None
        return torch.tensor(self.rows, device=weight.device, dtype=weight.dtype)[:, None]

    def __str__(self) -> str:
        return f"{(Decimal(repr(self.sparsity)) * 100).normalize():f}%"

    def pruned(self, total: int) -> int:
        """How many of `total` weights go: floor(sparsity * total), exact in the decimal text of the sparsity.

        >>> Unstructured(0.29).pruned(100), int(0.29 * 100)
        (29, 28)
        """
        return int(Fraction(repr(self.sparsity)) * total)

    def keep(self, score: Tensor, per: Scope = "row", *, checked: bool = False) -> Tensor:
        """The mask (out, in) of what stays: in every scope the lowest scores go, of equal scores the earlier first.

        per: "row", "matrix", or an int: blocks of that many columns, all rows jointly. Of a single row or column the
            matrix, as nothing less of it could give up anything.
        checked: the caller knows that there is no NaN; an accelerator is not waited for then
        Raises ValueError for NaN in the score.
        """
        _check_score(score, checked)
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for part, out in zip(_scopes(score, per), _scopes(mask, per), strict=True):
            flat = part if per == "row" and part.shape[1] > 1 else part.reshape(1, -1)
            out.copy_(_lowest(flat, self.pruned(flat.shape[1])).logical_not_().view(part.shape))
        return mask

    def satisfied(self, weight: Tensor, per: Scope = "row") -> bool:
        """Whether every scope of `weight` (out, in) has at least the zeros that this pattern asks for."""
        for part in _scopes(weight == 0, per):
            flat = part if per == "row" and part.shape[1] > 1 else part.reshape(1, -1)
            if (flat.sum(1) < self.pruned(flat.shape[1])).any():
                return False
        return True

    def check(self, width: int, name: str) -> None:
        """Every width will do."""


def row_factors(importance: Tensor) -> tuple[float, ...]:
    """What rows (out,) are multiplied by so that their errors, squared, count by the root of their importance.

    The fourth root of the importance over its mean, at least 0.177. With the square root errors would count by the
    importance itself, which is an estimate: where it is of few tokens that is worse, and of many no better.

    >>> row_factors(torch.tensor([1.0, 16.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    (0.841, 1.682, 0.841, 0.841, 0.841, 0.177, 0.177, 0.177, 0.177, 0.177)
    """
    over = importance.double() / importance.double().mean().clamp_min(1e-300)
    return tuple(round(factor, 3) for factor in over.clamp_min(2.0**-10).pow(0.25).tolist())


@dataclass(frozen=True, init=False, repr=False)
class NM:
    """Keep `keep` of every `group` consecutive input columns of a row: 1 <= keep < group.

    pairs: neighbouring columns stay or go together, as 4:8 in pairs, what sparse tensor cores take of NVFP4. Scores are
        added up in a pair, so they should be what removing a weight costs

    Where all but two of a group stay and the group is even (4:6, 6:8, 8:10 ...), every group can be covered by
    overlapping windows of 2:4 (`sparsekit.maths.slide`), and columns that do not fill a last group stay dense.

    >>> NM(2, 4).keep(torch.tensor([[1.0, 4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]))
    tensor([[False,  True,  True, False],
            [False, False,  True,  True]])
    >>> NM(keep=1, group=4), NM(1, 4).sparsity
    (NM(keep=1, group=4), 0.75)
    >>> NM(2, 4, pairs=True).keep(torch.tensor([[1.0, 4.0, 3.0, 3.0]]))
    tensor([[False, False,  True,  True]])
    """

    kept: int
    group: int
    pairs: bool

    def __init__(self, keep: int, group: int, pairs: bool = False) -> None:
        if not 1 <= keep < group:
            raise ValueError(
                f"{keep}:{group} keeps {keep} of {group}; the first number must be at least 1 and below the second"
            )
        if pairs and (keep % 2 or group % 2):
            raise ValueError(f"{keep}:{group}p keeps pairs of neighbours, so both numbers must be even")
        object.__setattr__(self, "kept", int(keep))
        object.__setattr__(self, "group", int(group))
        object.__setattr__(self, "pairs", bool(pairs))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}{'p' if self.pairs else ''}"

    def __repr__(self) -> str:
        return f"NM(keep={self.kept}, group={self.group}{', pairs=True' if self.pairs else ''})"

    @property
    def sparsity(self) -> float:
        """The fraction removed of a whole group."""
        return (self.group - self.kept) / self.group

    @property
    def slides(self) -> bool:
        """Whether its groups are windows of 2:4 that overlap, so that a last group need not be full."""
        return not self.pairs and self.group > 4 and self.group % 2 == 0 and self.kept == self.group - 2

    def whole(self, width: int) -> int:
        """How many of `width` columns are in full groups; the others stay dense."""
        return width - width % self.group

    def keep(self, score: Tensor, per: Scope = "row", *, checked: bool = False) -> Tensor:
        """The mask (out, in) of what stays; `per` changes nothing, as a group is its own scope.

        checked: the caller knows that there is no NaN
        Raises ValueError for NaN in the score and for a width that the pattern does not fit.
        """
        _check_score(score, checked)
        self.check(score.shape[1], "this layer")
        whole = self.whole(score.shape[1])
        groups = score[:, :whole].reshape(-1, self.group)
        kept = self.lowest(groups.t().contiguous()).logical_not_().t().reshape(len(score), whole)
        return torch.nn.functional.pad(kept, (0, score.shape[1] - whole), value=True)

    def lowest(self, groups: Tensor) -> Tensor:
        """What goes of groups (group, n), one in each column, by their scores, of which none is NaN."""
        size, pruned = self.group, self.group - self.kept
        if self.pairs:
            groups = groups.view(size // 2, 2, -1).sum(1)
            size, pruned = size // 2, pruned // 2
        gone = _lowest(groups.t(), pruned).t() if size > _PAIRWISE else _rank(groups) < pruned
        return gone.repeat_interleave(2, 0) if self.pairs else gone

    def satisfied(self, weight: Tensor, per: Scope = "row") -> bool:
        """Whether every group of `weight` (out, in) has at least group - keep zeros, in pairs where it is of pairs."""
        whole = self.whole(weight.shape[1])
        if whole != weight.shape[1] and not self.slides:
            return False
        if not weight[:, :whole].numel():
            return True
        zeros = (~weight.bool())[:, :whole].reshape(-1, self.group)
        if self.pairs:
            zeros = zeros.view(len(zeros), -1, 2).all(2)
        # sums of bools would be int64, which takes ten times as long
        counts = zeros.view(torch.uint8).sum(1, dtype=torch.uint8) if self.group < 256 else zeros.sum(1)
        return int(counts.min()) >= (self.group - self.kept) // (2 if self.pairs else 1)

    def check(self, width: int, name: str) -> None:
        """Raise ValueError when the group does not divide a layer of `width` input columns, or does not fit into it."""
        if width % self.group == 0 or (self.slides and width > self.group):
            return
        fitting = [group for group in range(2, 65) if width % group == 0]
        same = [
            f"{self.kept * group // self.group}:{group}" for group in fitting if self.kept * group % self.group == 0
        ]
        if same:
            advice = f"the same sparsity fits as {', '.join(same)}"
        elif fitting:
            advice = f"groups of {', '.join(map(str, fitting))} would"
        else:
            advice = "no group from 2 to 64 does"
        raise ValueError(
            f"{name} has {width} input columns, which groups of {self.group} ({self}) do not divide: {advice}; "
            f'or ask for "{Unstructured(self.sparsity)}", or leave this layer out'
        )


Pattern = Unstructured | NM


def parse(text: "str | float | Pattern") -> Pattern:
    """Read a pattern: "50%", "2:4" (2 kept of 4), "4:8p" (in pairs), or the fraction removed as 0.5 or "0.5".

    >>> parse("2:4"), parse("33.3%"), parse(0.5) == parse("50%")
    (NM(keep=2, group=4), Unstructured(sparsity=0.333), True)
    >>> parse("50")
    Traceback (most recent call last):
    ValueError: pattern "50" is not a fraction below 1; for 50 percent write "50%"
    """
    if isinstance(text, Unstructured | NM):
        return text
    asked = str(text).strip()
    if pair := re.fullmatch(r"(\d+)\s*:\s*(\d+)\s*(p?)", asked):
        return NM(int(pair[1]), int(pair[2]), bool(pair[3]))
    percent = asked.endswith("%")
    try:
        number = Decimal(asked.removesuffix("%").strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ValueError(
            f'pattern "{asked}" is not understood; write "50%", "2:4" (2 kept of 4), "4:8p" (in pairs) or 0.5'
        )
    if not percent and 1 <= number < 100:
        raise ValueError(f'pattern "{asked}" is not a fraction below 1; for {number:f} percent write "{number:f}%"')
    fraction = number / 100 if percent else number
    if not 0 <= fraction < 1:
        raise ValueError(f'pattern "{asked}" must remove at least 0% and less than 100% of the weights')
    return Unstructured(float(fraction))


def _scopes(matrix: Tensor, per: Scope) -> tuple[Tensor, ...]:
    if per in ("row", "matrix") or 1 in matrix.shape:
        return (matrix,)
    if isinstance(per, int) and not isinstance(per, bool) and per > 0:
        return matrix.split(per, dim=1)
    raise ValueError(f'per is "row", "matrix" or a number of columns, not {per!r}')


def _check_score(score: Tensor, checked: bool) -> None:
    if score.ndim != 2:
        raise ValueError(f"a score is a matrix (out, in), not of shape {tuple(score.shape)}")
    if not checked and score.isnan().any():
        raise ValueError("the score contains NaN, so its lowest entries are not defined; look at the weight and inputs")


def _lowest(score: Tensor, count: int) -> Tensor:
    """The `count` lowest entries of every row of `score` (rows, n), of equal ones the earliest."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values  # (rows, 1)
    lowest = score <= threshold
    if score.device.type != "cpu":  # to ask whether there are ties would be to wait for the answer
        below = score < threshold
        return below | ((lowest & ~below).cumsum(1) <= count - below.sum(1, keepdim=True)) & lowest
    tied = (lowest.sum(1) != count).nonzero().squeeze(1)
    if len(tied):  # sorting everything for their sake would dominate a walk
        score, threshold = score[tied], threshold[tied]
        below, equal = score < threshold, score == threshold
        missing = count - below.sum(1, keepdim=True)
        lowest[tied] = below | (equal & (equal.cumsum(1) <= missing))
    return lowest


def _rank(groups: Tensor) -> Tensor:
    """The rank of every entry in its column of `groups` (group, n), of equal ones the earlier first."""
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for i in range(len(groups) - 1):
        first = groups[i] <= groups[i + 1 :]
        rank[i + 1 :] += first
        rank[i] += first.logical_not_().sum(0, dtype=torch.uint8)
    return rank


def has_pattern(weight: Tensor, pattern: "Pattern") -> bool:
    """Whether a weight (out, in) has the zeros of a pattern, whatever the scope was in which weights competed.

    Of an unstructured pattern rounding may lose less than one weight a row or a column; of a single column less than
    one, of a single row less than one in SMALLEST columns. More zeros are allowed.
    """
    if isinstance(pattern, NM):
        return pattern.satisfied(weight)
    zeros = weight.numel() - int(weight.count_nonzero())
    return zeros > pattern.sparsity * weight.numel() - may_lose(*weight.shape)


def may_lose(out: int, width: int) -> int:
    """How many weights, but one, rounding may lose of an unstructured pattern (see `has_pattern`)."""
    if width == 1:
        return 1
    return max(out, width) if out > 1 else -(-width // SMALLEST)


def thinned(matrix: Tensor, count: int) -> Tensor:
    """About `count` entries of a matrix (rows, columns), as many from each column: a stride that shares no factor."""
    stride = max(1, matrix.numel() // max(1, count))
    while math.gcd(stride, matrix.shape[1]) > 1:
        stride += 1
    return matrix.flatten()[::stride]
