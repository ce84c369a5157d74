"""What a layer-wise solver may know of a linear's inputs: sums over tokens, never the tokens themselves."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparsekit.maths.norms import SAMPLE, Norms, refuse_infinite
from sparsekit.maths.sums import total

PANEL = 2**19  # elements of a panel of rows
Ridge = Literal["mean", "column", "root"]


class Stats(Norms):
    """Sums over the inputs x (in,) of one linear, or of several that read the same tensor.

    gram         sum x x'  (in, in)
    squares, mean, count  of the tokens; all-zero rows (padding) are not tokens
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
        self._begin(width, device, dtype)

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
    def squares(self) -> Tensor:
        """sum x^2 (in,): the Gram's diagonal."""
        return self._gram.diagonal()

    def _panels(self) -> list[tuple[int, int]]:
        """Ranges of columns. Products of a panel with itself and what lies right of it save up to half the work."""
        count = min(8, max(1, self.width // 256))
        edges = [self.width * index // count for index in range(count + 1)]
        return list(pairwise(edges))

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
        x, delta = self._rows_of(inputs, dense)
        for start, stop in self._panels():
            self._gram[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
        self._mirrored = False
        self._count(x, delta)
        if self.width > 2 * SAMPLE:
            self._keep(x, delta)
        if delta is not None:
            if self.drift_cross is None or self.drift_gram is None:
                self.drift_cross, self.drift_gram = torch.zeros_like(self._gram), torch.zeros_like(self._gram)
            self.drift_cross.addmm_(delta.t(), x)
            self.drift_gram.addmm_(delta.t(), delta)

    @torch.no_grad()
    def target(self, weight: Tensor) -> Tensor:
        """B = W sum x_d x' (out, in), the linear term of the quadratic that every layer-wise method minimises."""
        product = weight @ self.gram
        return product if self.drift_cross is None else product.addmm_(weight, self.drift_cross)

    def ridge(self, damping: float | None = None, by: Ridge = "mean") -> Tensor:
        """A ridge for every input (in,), so that a solution does not follow what these tokens show by chance.

        damping: in units of the Gram's diagonal; None: 1.5 / tokens an input, from 0.05 to 0.3, as the fewer there are,
            the more of what they show is chance. By measurement (docs/methods/refit.md).
            For "root": 2 / tokens an input, from 0.01 to 1.
        by: "mean", of the diagonal's mean, alike for all inputs; "column", of each input's own energy, for inputs of
            which a few are so large that they make the mean; "root", of the geometric mean of an input's energy and all
            inputs' geometric mean, between the two
        """
        each = self.width / max(1, self.count)
        if damping is None:
            damping = min(1.0, max(0.01, 2 * each)) if by == "root" else min(0.3, max(0.05, 1.5 * each))
        diagonal = self.gram.diagonal()
        if by == "root":
            seen = diagonal[diagonal > 0]
            typical = seen.log().mean().exp() if len(seen) else diagonal.new_ones(())
            return damping * (diagonal * typical).sqrt()
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

    @torch.no_grad()
    def estimate(self, weight: Tensor, dense_weight: Tensor) -> float:
        """`error` as cheaply as it can be had: of wide layers on the sample that `Norms` keeps, else exactly."""
        if self.width <= 2 * SAMPLE or not self._sample:
            return self.error(weight, dense_weight)
        return Norms.error(self, weight, dense_weight, Norms.energy(self, dense_weight))

    def _rows(self) -> int:
        """Rows of a weight to look at together, so that no other matrix of the weight's size is needed."""
        return max(1, PANEL // self.width)

    def parts(self) -> list[Tensor]:
        """The sums themselves, to be added up in place over processes that saw different tokens."""
        self._cache.clear()
        self._mirrored = False
        drifts = [drift for drift in (self.drift_cross, self.drift_gram) if drift is not None]
        return [self._gram, self.total, self.tokens, *drifts]

    def check(self, name: str) -> None:
        """Raise ValueError when the inputs of the linear `name` were not all finite."""
        super().check(name)
        if self.drift_gram is not None:
            refuse_infinite(self.drift_gram.diagonal(), f"the dense model's activations entering {name}")


def _dot(a: Tensor, b: Tensor) -> float:
    return float(total(a * b))
