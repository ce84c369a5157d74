"""Text in, tokens out, cut by the published protocols of SparseGPT and Wanda (arXiv 2301.00774, 2306.11695)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sparsekit.data.corpora import Corpus
from sparsekit.data.naming import CALIBRATION, check_length, corpus, resolve

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = 10_000  # documents found too short since the last one that was not, before `sample` gives up


def sample(corpus: Corpus, tokenizer: Any, *, samples: int, length: int, seed: int, first: int | None = None) -> Tensor:
    """Calibration tokens (samples, length), int64.

    first: a token that stands before every window and is counted in its length; the text is tokenised without special
    tokens then. None: as published.

    "windows": the joined text is tokenised once, with special tokens, and windows start anywhere in it.
    "documents": a random document, drawn with replacement, is taken if it has more than `length` tokens, and a
    window starts anywhere in it. Both follow the SparseGPT and Wanda code, draw for draw.
    """
    import torch

    draw = random.Random(seed)
    length -= first is not None
    if corpus.sampling == "documents":
        return _after(first, torch.tensor(list(_document_windows(corpus, tokenizer, samples, length, draw, first))))
    ids = _encode(tokenizer, corpus.separator.join(corpus.documents), first)
    if len(ids) <= length:
        raise ValueError(
            f"{corpus.name} has {len(ids)} tokens, and calibration windows of {length} need at least {length + 1}: "
            "take more text or a smaller `length`"
        )
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return _after(first, torch.tensor([ids[start : start + length] for start in starts]))


def windows(corpus: Corpus, tokenizer: Any, length: int, limit: int | None = None, first: int | None = None) -> Tensor:
    """Test tokens (n, length), int64: the joined text, tokenised once with special tokens, cut without overlap.

    first: as in `sample`; it is not scored, as nothing is predicted before it.

    The tail is dropped. `limit` and the corpus's own limit keep the first windows only.
    """
    import torch

    length -= first is not None
    ids = _encode(tokenizer, corpus.separator.join(corpus.documents), first)
    count = min([len(ids) // length, *(each for each in (limit, corpus.limit) if each is not None)])
    if len(ids) < length:
        raise ValueError(
            f"{corpus.name} has {len(ids)} tokens, fewer than one window of {length}: "
            "take more text or a smaller `length`"
        )
    return _after(first, torch.tensor(ids[: count * length]).view(count, length))


def _after(first: int | None, tokens: Tensor) -> Tensor:
    """Put a token before each of (n, length)."""
    import torch

    return tokens if first is None else torch.cat((torch.full((len(tokens), 1), first), tokens), 1)


def _document_windows(
    corpus: Corpus, tokenizer: Any, samples: int, length: int, draw: random.Random, first: int | None
) -> Iterator[list[int]]:
    short: set[int] = set()  # documents known to be too short
    used: set[int] = set()
    longest = fruitless = 0
    for _ in range(samples):
        while True:
            if len(short) == len(corpus.documents) or fruitless >= PATIENCE:
                raise ValueError(
                    f"{'none' if not used else 'too few'} of the {len(corpus.documents)} documents of {corpus.name} "
                    f"have more than {length} tokens ({len(short)} tried, the longest of them has {longest}): take a "
                    "smaller `length`, longer documents, or `pack: true`, which joins documents"
                )
            index = draw.randint(0, len(corpus.documents) - 1)
            if index in short:
                continue
            ids = _encode(tokenizer, corpus.documents[index], first)
            if len(ids) > length:
                break
            short.add(index)
            longest, fruitless = max(longest, len(ids)), fruitless + 1
        fruitless = 0
        used.add(index)
        start = draw.randint(0, len(ids) - length - 1)
        yield ids[start : start + length]
    if len(used) < samples / 2:
        warnings.warn(
            f"the {samples} calibration samples come from only {len(used)} documents of {corpus.name}: the others are "
            f"not longer than {length} tokens, or there are no others",
            stacklevel=4,
        )


def _encode(tokenizer: Any, content: str, first: int | None) -> list[int]:
    # verbose=False: that a text is longer than the model's context is the very idea here, and no news to the user.
    special = {} if first is None else {"add_special_tokens": False}
    return tokenizer(content, verbose=False, **special)["input_ids"]


def own_first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text by itself, as Gemma's and LLaMA's do; None if it puts none."""
    token = getattr(tokenizer, "bos_token_id", None)
    return token if token is not None and tokenizer("a")["input_ids"][:1] == [token] else None


def calibration_tokens(
    settings: Mapping[str, Any],
    tokenizer: Any,
    positions: int | None = None,
    vocab: int | None = None,
    first: int | None = None,
) -> Tensor:
    """Calibration tokens (samples, length), int64, as `sample` cuts them.

    settings: {source, samples (128), length (2048), seed (0), the source's own options}. The length is never taken
        from the model: a context of 128k would need terabytes of activations.
    positions: size of the model's position table. vocab: rows of its embedding. first: as in `sample`.
    Raises ValueError if settings, text, tokenizer and model do not fit each other.
    """
    resolve(settings)
    numbers = {"samples": 128, "length": 2048, "seed": 0} | {k: settings[k] for k in CALIBRATION if k in settings}
    for key, least in {"samples": 1, "length": 2, "seed": 0}.items():
        if type(numbers[key]) is not int or numbers[key] < least:
            raise ValueError(f"calibration `{key}` is {numbers[key]!r}, must be a whole number of at least {least}")
    check_length(numbers["length"], positions, "calibration")
    tokens = sample(corpus(settings, "calibration"), tokenizer, **numbers, first=first)
    if vocab is not None and int(tokens.max()) >= vocab:
        raise ValueError(
            f"the tokenizer gives token {int(tokens.max())}, but the model embeds {vocab}: they do not fit"
        )
    return tokens
