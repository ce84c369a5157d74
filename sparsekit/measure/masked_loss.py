"""How well an encoder predicts tokens that were masked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsekit.contracts import Count, Figure, Fraction, Measure, Preparation

if TYPE_CHECKING:
    from sparsekit.contracts import Subject


def masked_loss(
    preparation: Preparation,
    *,
    source: str = "python-docs",
    windows: Count = 64,
    length: Count = 128,
    share: Fraction = 0.15,
) -> Measure:
    """The loss (nats a token) on masked tokens of models such as BERT, each window between its special tokens.

    source: a source of text, or a local file; its test part. windows, length: so many, of so many tokens.
    share: of the tokens that are masked, the same ones for every model; all by the mask token, none by others.

    Source: Devlin et al. 2019, arXiv 1810.04805, section 3.1 (task 1).
    """
    tokenizer = preparation.tokenizer
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError("masked-loss is of models that predict masked tokens, and the tokenizer has no mask token")
    ends = [getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id")]
    text = preparation.windows(source, length - sum(end is not None for end in ends), windows)
    tokens = torch.cat([_column(ends[0], text), text, _column(ends[1], text)], 1)
    special = torch.tensor(sorted({mask, *tokenizer.all_special_ids}))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < share
    hidden &= ~torch.isin(tokens, special)
    hidden[:, 1] |= ~hidden.any(1)  # a window without any would have no loss
    given = tokens.masked_fill(hidden, mask)

    @torch.no_grad()
    def measure(subject: Subject) -> dict[str, Figure]:
        model, each = subject.model, []
        for row, truth, place in zip(given, tokens, hidden, strict=True):
            logits = getattr(model(input_ids=row[None].to(model.device)), "logits", None)
            if logits is None or logits.shape[:2] != (1, len(row)):
                raise ValueError(f"{type(model).__name__} predicts no tokens, so masked-loss has nothing to measure")
            each.append(cross_entropy(logits[0].cpu()[place].float(), truth[place]).double())
        losses = torch.stack(each)
        error = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else None
        settings = {"source": source, "length": tokens.shape[1], "windows": len(tokens), "share": share}
        name = f"{Path(source).name} masked loss"
        return {name: Figure(float(losses.mean()), error, len(losses), "windows", "lower", settings, "masked loss")}

    return measure


def _column(token: int | None, text: Tensor) -> Tensor:
    return torch.full((len(text), 0 if token is None else 1), token or 0)
