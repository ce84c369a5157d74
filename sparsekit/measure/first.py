"""Whether a model's first token stands before every window of text: what it was trained with, it is measured with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from sparsekit.data import CALIBRATION, corpus, own_first_token

BOS = ("auto", "window", "published")
LOOK, LOOK_LENGTH = 4, 256  # windows, and tokens of each, on which `auto` compares


@dataclass(frozen=True)
class FirstToken:
    """What was decided. token: that stands before every window, None: there is none; used: window or published."""

    token: int | None
    used: str
    why: str


def first_token(bos: str, tokenizer: Any, model: Callable[[], Any], text: Callable[[], str]) -> FirstToken:
    """Decide how windows begin.

    bos: window, the first token stands before every window, is counted in its length and is not scored; published, as
        the code of SparseGPT and Wanda cuts windows; auto, window if the tokenizer adds a first token by itself and the
        dense model's loss on a few windows falls with it
    model: gives the dense model, where auto has to look
    text: gives some of the text, for auto to look at

    Raises:
        ValueError: window was asked and the tokenizer has no first token.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "published":
        return FirstToken(None, "published", "it was asked")
    if bos == "window":
        if token is None:
            raise ValueError("bos is window, and the tokenizer has no first token (bos_token): give published")
        return FirstToken(int(token), "window", "it was asked")
    if not hasattr(tokenizer, "bos_token_id") or own_first_token(tokenizer) is None:
        return FirstToken(None, "published", "the tokenizer adds no first token by itself")
    ids = _some_tokens(tokenizer, text())
    if ids is None:
        return FirstToken(None, "published", "there is no text to look at")
    plain, after = _losses(model(), ids, int(token))  # type: ignore[arg-type]
    seen = f"the dense model's loss on {len(ids)} windows is {after:.3f} with it and {plain:.3f} without"
    return FirstToken(int(token), "window", seen) if after < plain else FirstToken(None, "published", seen)  # type: ignore[arg-type]


def beginning(settings: str | Mapping[str, Any], role: Literal["test", "calibration"]) -> str:
    """The first documents of a text that a recipe names. role: which split of it"""
    given = {"source": settings} if isinstance(settings, str) else dict(settings)
    given = {key: value for key, value in given.items() if value is not None}
    found = corpus(given, role, (*CALIBRATION, "batch", "name", "windows"))
    return found.separator.join(found.documents[:200])


def _some_tokens(tokenizer: Any, text: str) -> torch.Tensor | None:
    """A few windows (n, length), without special tokens; None where there is hardly any text."""
    ids = tokenizer(text[: LOOK * LOOK_LENGTH * 16], add_special_tokens=False, verbose=False)["input_ids"]
    length = min(LOOK_LENGTH, len(ids) // LOOK)
    return torch.tensor(ids[: LOOK * length]).view(LOOK, length) if length > 1 else None


@torch.no_grad()
def _losses(model: Any, ids: torch.Tensor, token: int) -> tuple[float, float]:
    """The mean cross-entropy of the same tokens without and with a first token before each window."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    means = []
    for before in (0, 1):
        total = 0.0
        for row in ids:
            given = torch.cat((torch.full((before,), token), row)).to(device)
            logits = model(input_ids=given[None], use_cache=False).logits[0, before:-1].float()
            total += float(cross_entropy(logits, given[before + 1 :]))
        means.append(total / len(ids))
    model.train(training)
    return means[0], means[1]
