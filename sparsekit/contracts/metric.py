"""Metrics: how good a model is, in figures.

A metric is a function `(preparation, *, options...) -> measure`, found through the entry-point group
`sparsekit.metrics` and named by a recipe's `evaluate.metrics`. Calling it reads its data and finds what is wrong,
before a weight is loaded; what it gives back measures a model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """One number that says how good a model is.

    value: the number; stderr: one standard error of it, None where it is not known
    count, of: how many of what were looked at, such as 6 "windows"
    better: whether more is better, or less
    settings: what must agree for two figures of this name to be comparable, such as length and source; JSON
    kind: what it is one of, which tables and pages put together, such as "perplexity"; empty for itself alone
    """

    value: float
    stderr: float | None = None
    count: int = 0
    of: str = ""
    better: Literal["higher", "lower"] = "higher"
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = ""


class Preparation(Protocol):
    """What a metric is given to get ready.

    tokenizer: the model's, or its image processor; config: of transformers
    length, batch, limit: of the recipe's `evaluate`: tokens of a window, sequences at a time, documents (None: all)
    dense: opens the model that was never pruned, to be called when a model is measured; None: it is nowhere to be had
    """

    tokenizer: Any
    config: Any
    length: int
    batch: int
    limit: int | None
    dense: Callable[[], Any] | None

    def windows(self, source: str | Mapping[str, Any], length: int | None = None, count: int | None = None) -> "Tensor":
        """Test text as token windows (n, length): a source's name, a local file, or {source, its options...}.

        Raises ValueError where there is no such text, or too little of it.
        """
        ...


class Subject(Protocol):
    """A model that is measured. model, tokenizer: for metrics that generate; others need log-probabilities alone.

    batch: sequences, or images, at a time
    """

    model: Any
    tokenizer: Any
    batch: int

    def log_probabilities(self, tokens: "Tensor") -> "Iterator[Tensor]":
        """Window by window of (n, length) the log-probability (length - 1,) of each token but the first, float32."""
        ...


class Measure(Protocol):
    """What a metric gives back."""

    def __call__(self, subject: Subject, /) -> dict[str, Figure]:
        """The figures of a model, by name."""
        ...


class Metric(Protocol):
    """How good a model is."""

    def __call__(self, preparation: Preparation, /, **options: Any) -> Measure:
        """Read what is needed. Raises ValueError for options and data that cannot be used."""
        ...
