"""What a layer-wise solver may know of a linear's inputs: sums over tokens, never the tokens themselves."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

PANEL = 2**19  # elements of a panel of rows
Ridge = Literal["mean", "column"]


class Stats:
    """Sums over the inputs x (in,) of one linear, or of several that read the same tensor.

    gram         sum x x'  (in, in)
    mean, count  of the tokens; all-zero rows (padding) are not tokens
    With a dense stream, where the target is W x_d on other inputs x_d and delta = x_d - x:
    drift_cross  sum delta x'  (in, in), else None
    drift_gram   sum delta delta'  (in, in), else None
    Differences are summed, not products of x_d, so that a small drift is not lost by cancellation in float32.

    >>> stats = Stats.of(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> stats.gram, stats.mean, stats.count
    (tensor([[10.,  2.],
            [ 2.,  4.]]), tensor([2., 1.]), 2)
    """

    drift_cross: Tensor | None = None
    drift_gram: Tensor | None = None

    def __init__(self, width: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        self._gram = torch.zeros(width, width, device=device, dtype=dtype)
        self._mirrored = True
        self.total = torch.zeros(width, device=device, dtype=dtype)
        self.tokens = torch.zeros((), device=device, dtype=torch.int64)
        self._cache: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, inputs: Tensor, dense: Tensor | None = None) -> "Stats":
        """The statistics of `inputs` (..., in), on their device; float64 if they are, else float32."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        stats = cls(inputs.shape[-1], inputs.device, dtype)
        stats.add(inputs, dense)
        return stats

    @property
    def gram(self) -> Tensor:
        """sum x x' (in, in). Only its upper part is accumulated; the lower is filled in when it is asked for."""
        if not self._mirrored:
            for start, stop in self._panels():
                self._gram[stop:, start:stop] = self._gram[start:stop, stop:].t()
            self._mirrored = True
        return self._gram

    @gram.setter
    def gram(self, gram: Tensor) -> None:
        """A symmetric matrix (in, in) from elsewhere."""
        self._gram, self._mirrored = gram, True

    @property
    def width(self) -> int:
        """The number of input columns."""
        return len(self._gram)

    def _panels(self) -> list[tuple[int, int]]:
        """Ranges of columns. Products of a panel with itself and what lies right of it save up to half the work."""
        count = min(8, max(1, self.width // 256))
        edges = [self.width * index // count for index in range(count + 1)]
        return list(pairwise(edges))

    @property
    def count(self) -> int:
        """The number of tokens, all-zero rows left out."""
        return int(self.tokens)

    @property
    def mean(self) -> Tensor:
        """The mean token (in,)."""
        return self.total / self.tokens.clamp(min=1)

    @property
    def cross(self) -> Tensor:
        """sum x_d x' (in, in): a new matrix with a dense stream, the Gram itself without."""
        return self.gram if self.drift_cross is None else self.gram + self.drift_cross

    @property
    def dense_gram(self) -> Tensor:
        """sum x_d x_d' (in, in): a new matrix with a dense stream, the Gram itself without."""
        if self.drift_cross is None or self.drift_gram is None:
            return self.gram
        return self.gram + self.drift_cross + self.drift_cross.t() + self.drift_gram

    @torch.no_grad()
    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens `inputs` (..., in), and the dense model's inputs of the same tokens (same shape).

        Tokens that come without `dense` count as not drifted. Raises ValueError for other shapes.
        """
        if inputs.shape[-1] != self.width:
            raise ValueError(f"inputs of width {inputs.shape[-1]} do not fit statistics of width {self.width}")
        if dense is not None and dense.shape != inputs.shape:
            raise ValueError(
                f"the dense inputs {tuple(dense.shape)} are not of the inputs' shape {tuple(inputs.shape)}"
            )
        self._cache.clear()
        x = inputs.detach().reshape(-1, self.width).to(self._gram)
        for start, stop in self._panels():
            self._gram[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
        self._mirrored = False
        self.total += x.sum(0)
        if dense is not None:
            delta = dense.detach().reshape(-1, self.width).to(self._gram) - x
            if self.drift_cross is None or self.drift_gram is None:
                self.drift_cross, self.drift_gram = torch.zeros_like(self._gram), torch.zeros_like(self._gram)
            self.drift_cross.addmm_(delta.t(), x)
            self.drift_gram.addmm_(delta.t(), delta)
            self.tokens -= _empty_rows(x, delta)
        else:
            self.tokens -= _empty_rows(x)
        self.tokens += len(x)

    @torch.no_grad()
    def target(self, weight: Tensor) -> Tensor:
        """B = W sum x_d x' (out, in), the linear term of the quadratic that every layer-wise method minimises."""
        product = weight @ self.gram
        return product if self.drift_cross is None else product.addmm_(weight, self.drift_cross)

    def ridge(self, damping: float | None = None, by: Ridge = "mean") -> Tensor:
        """A ridge for every input (in,), so that a solution does not follow what these tokens show by chance.

        damping: in units of the Gram's diagonal; None: 1.5 / tokens an input, from 0.01 to 0.3, as the fewer there are,
            the more of what they show is chance. By measurement (docs/methods.md).
        by: "mean", of the diagonal's mean, alike for all inputs; "column", of each input's own energy, for inputs of
            which a few are so large that they make the mean
        """
        if damping is None:
            damping = min(0.3, max(0.01, 1.5 * self.width / max(1, self.count)))
        diagonal = self.gram.diagonal()
        return damping * (diagonal if by == "column" else diagonal.mean().expand_as(diagonal))

    @torch.no_grad()
    def energy(self, dense_weight: Tensor) -> float:
        """||W x_d||^2 over all tokens."""
        energy = 0.0
        for rows in dense_weight.split(self._rows()):
            energy += _dot(rows @ self.gram, rows)
            if self.drift_cross is not None and self.drift_gram is not None:
                energy += 2 * _dot(rows @ self.drift_cross, rows) + _dot(rows @ self.drift_gram, rows)
        return max(energy, 0.0)

    @torch.no_grad()
    def error(self, weight: Tensor, dense_weight: Tensor, energy: float | None = None) -> float:
        """The relative error ||V x - W x_d||^2 / ||W x_d||^2 of V = `weight`; pass `energy` to reuse the divisor.

        With d = V - W: tr(d G d') - 2 tr(d (W drift_cross)') + tr(W drift_gram W'): no difference of large sums.
        A layer of zero energy has error 0, or infinity when V's output is not zero.
        """
        error = 0.0
        for rows, dense in zip(weight.split(self._rows()), dense_weight.split(self._rows()), strict=True):
            difference = rows - dense
            error += _dot(difference @ self.gram, difference)
            if self.drift_cross is not None and self.drift_gram is not None:
                error += _dot(dense @ self.drift_gram, dense) - 2 * _dot(dense @ self.drift_cross, difference)
        error = max(error, 0.0)
        energy = self.energy(dense_weight) if energy is None else energy
        return error / energy if energy > 0 else (float("inf") if error > 0 else 0.0)

    def _rows(self) -> int:
        """Rows of a weight to look at together, so that no other matrix of the weight's size is needed."""
        return max(1, PANEL // self.width)

    def parts(self) -> list[Tensor]:
        """The sums themselves, to be added up in place over processes that saw different tokens."""
        self._cache.clear()
        self._mirrored = False
        drifts = [drift for drift in (self.drift_cross, self.drift_gram) if drift is not None]
        return [self._gram, self.total, self.tokens, *drifts]

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute()` gave the first time for `key`: q, k and v share one factorization. `add` forgets all."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def check(self, name: str) -> None:
        """Raise ValueError when the inputs of the linear `name` were not all finite."""
        for stream, gram in (("", self.gram), ("the dense model's ", self.drift_gram)):
            if gram is not None and (bad := int((~gram.diagonal().isfinite()).sum())):
                raise ValueError(
                    f"{stream}activations entering {name} contain NaN or Inf, or are so large that their squares "
                    f"overflow ({bad} of {self.width} columns); run the model in float32 or bfloat16, or look at the "
                    "block before"
                )

    def check_weight(self, weight: Tensor, init: Tensor | None = None) -> None:
        """Every solver's first line: raise ValueError unless `weight` is a finite matrix (out, in) of this width.

        A warm start must be finite and of the weight's shape; inputs that were not finite are refused too.
        """
        if weight.ndim != 2 or weight.shape[1] != self.width:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} does not fit statistics of width {self.width}; "
                f"it must be (out, {self.width})"
            )
        if not weight.isfinite().all():
            raise ValueError("the weight contains NaN or Inf, so it cannot be pruned; check the source checkpoint")
        if init is not None and init.shape != weight.shape:
            raise ValueError(f"init has shape {tuple(init.shape)}, the weight {tuple(weight.shape)}; make them equal")
        if init is not None and not init.isfinite().all():
            raise ValueError("init contains NaN or Inf, so nothing can start from it; look at the solver before")
        self.check("this layer")


def _empty_rows(x: Tensor, delta: Tensor | None = None) -> int:
    """How many rows (padding) are zero throughout; only rows that begin with a zero are looked at."""
    rows = (x[:, 0] == 0).nonzero().squeeze(1)
    empty = ~x[rows].any(1)
    if delta is not None:
        empty &= ~delta[rows].any(1)
    return int(empty.count_nonzero())


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
