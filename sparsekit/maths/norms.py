"""What is known of a linear's inputs without products of them: norms, and a sample of tokens."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sparsekit.maths.sums import home_of_double, total

SAMPLE = 512  # tokens at least that are kept, where there are enough, to estimate errors by
ROWS = 256  # tokens whose outputs are there at a time
FEWEST, SHARE = 128, 32  # tokens at least of fewer: one in SHARE, so that estimates cost little beside forward passes


class Norms:
    """Sums over the inputs x (in,) of one linear, or of several that read the same tensor, without the Gram matrix.

    squares      sum x^2 (in,)
    mean, count  of the tokens; all-zero rows (padding) are not tokens

    A solver whose parameter `stats` is a `Norms` needs no more, and the walk then gathers no more. Errors are estimated
    on a sample of tokens, evenly over all: one in 16 to 32, from 128 to 1024 of them. `Stats` has the Gram besides.

    >>> norms = Norms.of(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> norms.squares, norms.mean, norms.count
    (tensor([10.,  4.]), tensor([2., 1.]), 2)
    """

    def __init__(self, width: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32):
        self._begin(width, device, dtype)
        self._squares = torch.zeros_like(self.total)

    def _begin(self, width: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self.total = torch.zeros(width, device=device, dtype=dtype)
        self.tokens = torch.zeros((), device=device, dtype=torch.int64)
        self._cache: dict[Hashable, Any] = {}
        self._sample: list[tuple[Tensor, Tensor | None]] = []
        self._every, self._seen = 1, 0  # of how many tokens one is kept, and how many came

    @classmethod
    def of(cls, inputs: Tensor, dense: Tensor | None = None) -> Self:
        """The statistics of `inputs` (..., in), on their device; float64 if they are, else float32."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        stats = cls(inputs.shape[-1], inputs.device, dtype)
        stats.add(inputs, dense)
        return stats

    @property
    def squares(self) -> Tensor:
        """sum x^2 (in,)."""
        return self._squares

    @property
    def width(self) -> int:
        """The number of input columns."""
        return len(self.total)

    @property
    def count(self) -> int:
        """The number of tokens, all-zero rows left out."""
        return int(self.tokens)

    @property
    def mean(self) -> Tensor:
        """The mean token (in,)."""
        return self.total / self.tokens.clamp(min=1)

    @torch.no_grad()
    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens `inputs` (..., in), and the dense model's inputs of the same tokens (same shape).

        Tokens that come without `dense` count as not drifted. Raises ValueError for other shapes.
        """
        x, delta = self._rows_of(inputs, dense)
        self._squares += x.square().sum(0)
        self._count(x, delta)
        self._keep(x, delta)

    def _keep(self, x: Tensor, delta: Tensor | None) -> None:
        first = -self._seen % self._every
        self._sample.append((x[first :: self._every].clone(), None if delta is None else delta[first :: self._every]))
        self._seen += len(x)
        while sum(len(rows) for rows, _ in self._sample) > 2 * min(SAMPLE, max(FEWEST, self._seen // SHARE)):
            self._thin()

    def _thin(self) -> None:
        """Keep every second token of the sample."""
        place, kept = 0, []
        for rows, delta in self._sample:
            skip = place % 2
            place += len(rows)
            kept.append((rows[skip::2].clone(), None if delta is None else delta[skip::2].clone()))
        self._sample, self._every = [pair for pair in kept if len(pair[0])], 2 * self._every

    def _rows_of(self, inputs: Tensor, dense: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens (n, in), and what the dense model's differ by."""
        if inputs.shape[-1] != self.width:
            raise ValueError(f"inputs of width {inputs.shape[-1]} do not fit statistics of width {self.width}")
        if dense is not None and dense.shape != inputs.shape:
            raise ValueError(
                f"the dense inputs {tuple(dense.shape)} are not of the inputs' shape {tuple(inputs.shape)}"
            )
        self._cache.clear()
        x = inputs.detach().reshape(-1, self.width).to(self.total)
        return x, None if dense is None else dense.detach().reshape(-1, self.width).to(self.total) - x

    def _count(self, x: Tensor, delta: Tensor | None) -> None:
        self.total += x.sum(0)
        self.tokens += len(x) - _empty_rows(x, delta)

    @torch.no_grad()
    def energy(self, dense_weight: Tensor) -> float:
        """||W x_d||^2 over the sample, as far as it goes for all tokens."""
        x, delta = self._drawn()
        return self._share * _energy(x if delta is None else x + delta, dense_weight)

    @torch.no_grad()
    def error(self, weight: Tensor, dense_weight: Tensor, energy: float | None = None) -> float:
        """The relative error ||V x - W x_d||^2 / ||W x_d||^2 of V = `weight` on the sample; `energy`: the divisor.

        A layer of zero energy has error 0, or infinity when V's output is not zero.
        """
        x, delta = self._drawn()
        error = self._share * _energy(x, weight - dense_weight, delta, dense_weight)
        energy = self.energy(dense_weight) if energy is None else energy
        return error / energy if energy > 0 else (float("inf") if error > 0 else 0.0)

    def _drawn(self) -> tuple[Tensor, Tensor | None]:
        """The sample in one piece: tokens (n, in), and what the dense model's differ by."""
        if len(self._sample) != 1:
            x = torch.cat([self.total.new_empty(0, self.width), *(rows for rows, _ in self._sample)])
            drifts = [torch.zeros_like(rows) if delta is None else delta for rows, delta in self._sample]
            drifted = any(delta is not None for _, delta in self._sample)
            self._sample = [(x, torch.cat(drifts) if drifted else None)]
        return self._sample[0]

    def estimate(self, weight: Tensor, dense_weight: Tensor) -> float:
        """`error` as cheaply as it can be had: on a sample where that is less work."""
        return self.error(weight, dense_weight)

    @property
    def _share(self) -> float:
        return self._seen / max(1, sum(len(rows) for rows, _ in self._sample))

    def parts(self) -> list[Tensor]:
        """The sums, to be added up in place over processes that saw different tokens; each keeps its own sample."""
        self._cache.clear()
        return [self._squares, self.total, self.tokens]

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """All of it by names, to be kept on disk. ValueError with a dense stream, of which nothing is kept."""
        sums = self.parts()
        if len(sums) > 3 or any(delta is not None for _, delta in self._sample):
            raise ValueError("statistics of inputs that drifted from the dense ones are not kept")
        found = dict(zip(("sums", "total", "tokens"), sums, strict=True))
        if self._sample:
            found |= {"sample": self._drawn()[0], "seen": torch.tensor(self._seen)}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` gave."""
        width, device, dtype = tensors["total"].shape[0], tensors["total"].device, tensors["total"].dtype
        found = cls(width, device, dtype)
        for own, kept in zip(found.parts(), (tensors[name] for name in ("sums", "total", "tokens")), strict=True):
            own.copy_(kept)
        if "sample" in tensors:
            found._sample, found._seen = [(tensors["sample"], None)], int(tensors["seen"])
        return found

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute()` gave the first time for `key`: q, k and v share one factorization. `add` forgets all."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def check(self, name: str) -> None:
        """Raise ValueError when the inputs of the linear `name` were not all finite."""
        refuse_infinite(self.squares, f"activations entering {name}")

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


def refuse_infinite(squares: Tensor, what: str) -> None:
    """Raise ValueError unless these sums of squares (in,) are finite."""
    if bad := int((~squares.isfinite()).sum()):
        raise ValueError(
            f"{what} contain NaN or Inf, or are so large that their squares overflow "
            f"({bad} of {len(squares)} columns); run the model in float32 or bfloat16, or look at the block before"
        )


def _empty_rows(x: Tensor, delta: Tensor | None = None) -> int | Tensor:
    """How many rows (padding) are zero throughout; on a CPU only rows that begin with a zero are looked at."""
    if x.device.type != "cpu":  # nothing that the computer would wait for
        empty = ~x.any(1) if delta is None else ~(x.any(1) | delta.any(1))
        return empty.sum()
    rows = (x[:, 0] == 0).nonzero().squeeze(1)
    empty = ~x[rows].any(1)
    if delta is not None:
        empty &= ~delta[rows].any(1)
    return int(empty.count_nonzero())


def _energy(x: Tensor, weight: Tensor, drift: Tensor | None = None, dense: Tensor | None = None) -> float:
    """||W x - W_d delta||^2 over tokens x (n, in), some of them at a time."""
    energy = torch.zeros((), dtype=torch.float64, device=home_of_double(x.device))
    for start in range(0, len(x), ROWS):
        outputs = x[start : start + ROWS] @ weight.t()
        if drift is not None and dense is not None:
            outputs -= drift[start : start + ROWS] @ dense.t()
        energy += total(outputs.square_())
    return float(energy)
