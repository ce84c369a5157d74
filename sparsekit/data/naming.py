"""From the settings of a recipe to the text that they name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.data.corpora import Corpus, _file

FORMATS = {".txt": "text", ".raw": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv"}
CALIBRATION = ("samples", "length", "seed")  # the settings that belong to `sample`, not to a source


def resolve(settings: Mapping[str, Any], known: Sequence[str] = CALIBRATION) -> tuple[Callable[..., Corpus], dict]:
    """The source that settings name, and the options they give it. Reads no data; imports neither torch nor datasets.

    settings: {source: a name or a path to a local file, the source's own options...}; the keys `known` are passed over.
    Raises ValueError (plugins.UnknownName for a name) with one sentence for each mistake.
    """
    if not isinstance(settings.get("source"), str):
        raise ValueError(f"`source` must name a source or a local file, it is {settings.get('source')!r}")
    name = settings["source"]
    given = {key: value for key, value in settings.items() if key not in ("source", *known)}
    installed = {registry.normal(each) for each in registry.names("sources")}
    kind = FORMATS.get(Path(name).suffix.lower())
    if registry.normal(name) not in installed and (kind or Path(name).exists()):
        if not kind:
            raise ValueError(
                f"what `{name}` holds is not clear from its end ({', '.join(FORMATS)} are): "
                f"say it, as in {{source: text, path: {name}}}"
            )
        given, name = {"path": name} | given, kind
    function = registry.load("sources", name)
    for key in given:
        if registry.normal(key) not in registry.options(function):
            valid = [*registry.options(function), *known]
            raise ValueError(f"source `{name}`: unknown option `{key}`, {registry.suggest(key, valid)}")
    if problems := registry.check_options(function, given, f"source `{name}`"):
        raise ValueError("; ".join(problems))
    if "path" in given and registry.normal(name) in FORMATS.values():
        _file(given["path"])
    return function, {registry.normal(key): value for key, value in given.items()}


def corpus(settings: Mapping[str, Any], split: str, known: Sequence[str] = CALIBRATION) -> Corpus:
    """The text that settings name, as `resolve` takes them. Raises ValueError also for a source that gives no text."""
    function, options = resolve(settings, known)
    found = function(split, **options)
    if not isinstance(found, Corpus):
        raise ValueError(
            f"the source `{settings['source']}` gives images, and text is asked for here: name another one"
        )
    return found


def positions_of(config: Any) -> int | None:
    """The size of a model's position table, of its text's; None where text may be of any length (XLNet says -1)."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_length(length: int, positions: int | None, what: str) -> None:
    """Raise ValueError if a sequence of this length does not fit the model's position table."""
    if positions is not None and positions < length:
        raise ValueError(f"{what} `length` is {length}, but the model has {positions} positions: take a smaller one")


def drawn(available: int, settings: Mapping[str, Any], name: str, what: str) -> list[int]:
    """The numbers of `samples` different images or files of a source, drawn by `seed`.

    name: of the source; what: what it has, in the plural. Raises ValueError where it has too few.
    """
    count = settings["samples"]
    if available < count:
        raise ValueError(f"{name} has {available} {what}, fewer than `samples`, {count}: give more, or ask fewer")
    return random.Random(settings["seed"]).sample(range(available), count)
