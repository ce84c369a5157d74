"""Metrics: how good a model is, in figures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """One number that says how good a model is.

    value: the number; stderr: one standard error of it, None where it is not known
    count: of what was looked at, and of: what that is ("windows", "documents", "images")
    better: "higher" or "lower"
    settings: what must agree for two figures of this name to be comparable; JSON
    """

    value: float
    stderr: float | None = None
    count: int = 0
    of: str = ""
    better: Literal["higher", "lower"] = "higher"
    settings: dict[str, Any] = field(default_factory=dict)


class Subject(Protocol):
    """A model that is measured."""

    model: Any
    tokenizer: Any

    def log_probabilities(self, tokens: "Tensor") -> "Iterable[Tensor]":
        """For each window of tokens (windows, length) the log-probability of its tokens but the first (length - 1,)."""
        ...


class Metric(Protocol):
    """How good a model is: `(entry, *, tokenizer, config) -> prepared`, which measures.

    `prepare` reads the data and finds every mistake before weights are loaded; `measure` gives figures by name.
    """

    def __call__(self, settings: Mapping[str, Any], /, *, tokenizer: Any, config: Any) -> "Prepared":
        """Read what is needed. Raises ValueError for settings and data that cannot be used."""
        ...


class Prepared(Protocol):
    """A metric with its data."""

    def measure(self, subject: Subject) -> dict[str, Figure]:
        """The figures of a model, by name."""
        ...
