"""Metrics of anybody's: prepared before a weight is loaded, measured through log-probabilities."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit import registry
from sparsekit.contracts import Figure
from sparsekit.data import check_length, corpus, positions_of, windows
from sparsekit.measure.predictions import surprises

Measures = dict[str, Callable[["Subject"], dict[str, Figure]]]  # by the metric's name


@dataclass(frozen=True)
class Preparation:
    """See `sparsekit.contracts.Preparation`."""

    tokenizer: Any
    config: Any
    length: int = 2048
    batch: int = 1
    limit: int | None = None
    first: int | None = None
    dense: Callable[[], Any] | None = None

    def windows(self, source: str | Mapping[str, Any], length: int | None = None, count: int | None = None) -> Tensor:
        """Test text as token windows (n, length)."""
        settings = {"source": source} if isinstance(source, str) else dict(source)
        positions = positions_of(self.config)
        size = length or self.length
        check_length(size, positions, f"the metric's text {settings.get('source')}:")
        return windows(corpus(settings, "test", ()), self.tokenizer, size, count, self.first)


class Subject:
    """See `sparsekit.contracts.Subject`."""

    def __init__(self, model: Any, tokenizer: Any, batch: int = 1):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor) -> Iterator[Tensor]:
        """Window by window the log-probability (length - 1,) of each token but the first, float32 in CPU memory."""
        for each in surprises(self.model, tokens, batch=self.batch):
            yield -each.cpu()


def prepare(entries: Sequence[Any], preparation: Preparation) -> Measures:
    """The metrics that a recipe names, with their data.

    entries: each a name, or {name: options}

    Raises:
        ValueError: a metric is not there, is named twice, or its options or data cannot be used.
    """
    found: Measures = {}
    for entry in entries:
        [(name, options)] = entry.items() if isinstance(entry, Mapping) else [(entry, {})]
        function = registry.load("metrics", name)
        for problem in registry.option_problems(function, options or {}).values():
            raise ValueError(f"metric `{name}`: {problem}")
        if name in found:
            raise ValueError(f"the metric `{name}` is named twice: name it once")
        found[name] = function(preparation, **{registry.normal(key): value for key, value in (options or {}).items()})
    return found


def prepare_metric(
    metric: Callable[..., Any],
    tokenizer: Any,
    config: Any,
    *,
    length: int = 2048,
    dense: Callable[[], Any] | None = None,
    **options: Any,
) -> Callable[["Subject"], dict[str, Figure]]:
    """One metric with its data, outside of a recipe. Raises ValueError for options that cannot be used."""
    for problem in registry.option_problems(metric, options).values():
        raise ValueError(problem)
    found: Callable[[Subject], dict[str, Figure]] = metric(
        Preparation(tokenizer, config, length, dense=dense), **options
    )
    return found


def measured(measures: Measures, subject: Subject) -> dict[str, dict[str, Any]]:
    """The figures of a model by their names, as JSON.

    Raises:
        ValueError: a metric gives something else than figures, or a name that another has given.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, measure in measures.items():
        figures = measure(subject)
        if not isinstance(figures, dict) or not all(isinstance(each, Figure) for each in figures.values()):
            raise ValueError(f"the metric `{name}` must give figures by name, {{str: Figure}}")
        if twice := found.keys() & figures.keys():
            raise ValueError(f"the metric `{name}` gives `{min(twice)}`, which another metric gives too")
        found |= {key: asdict(each) for key, each in figures.items()}
    return found
