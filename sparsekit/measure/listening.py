"""What a model that hears makes of sound: how near its features are to the dense model's, and the words it writes."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsekit.contracts import Count, Figure, Measure, Positive, Preparation
from sparsekit.data import sounds, spread
from sparsekit.model import chosen_tower, given_sound, hears, sound_of

if TYPE_CHECKING:
    from sparsekit.contracts import Subject


def sound_features(
    preparation: Preparation, *, path: str, seconds: Positive | None = None, limit: Count | None = None
) -> Measure:
    """The cosine of a model's features of sound to the dense model's: of every place, and of their mean.

    path, seconds: as the source `sounds` has them; of a folder with train/ and test/ the latter. limit: files; null:
    all, or evaluate.limit. Of a model with a decoder its encoder's features are taken.
    """
    if preparation.dense is None:
        raise ValueError("sound-features are compared with the dense model's, and which that is was not said: give it")
    found = sounds("test", path=path, seconds=seconds)
    chosen = spread(found, limit or preparation.limit)
    dense, extractor = preparation.dense, _extractor(preparation.tokenizer)
    reference: list[Tensor] = []

    def measure(subject: Subject) -> dict[str, Figure]:
        own = [_places(subject.model, found.heard([index], extractor)) for index in chosen]
        if not reference:
            other = dense()
            reference.extend(_places(other, found.heard([index], extractor)) for index in chosen)
        settings = {"set": path, "files": len(chosen)}
        figures = {}
        for title, of in (("cosine", lambda each: each.mean(0)), ("cosine of places", lambda each: each)):
            pairs = zip(own, reference, strict=True)
            near = torch.stack(
                [cosine_similarity(of(mine), of(theirs), dim=-1).double().mean() for mine, theirs in pairs]
            )
            error = float(near.std()) / math.sqrt(len(near)) if len(near) > 1 else None
            figures[f"{found.name} {title}"] = Figure(
                float(near.mean()), error, len(near), "files", "higher", settings, "features"
            )
        return figures

    return measure


def word_errors(preparation: Preparation, *, path: str, limit: Count | None = None, new: Count = 128) -> Measure:
    """The share of words that a model which writes down what it hears gets wrong: Whisper's, or by CTC (wav2vec 2).

    path: a folder of sound with metadata.csv or .jsonl (`file_name`, `text`), as the source `sounds` has it; test/ of
    one with parts. limit: files; null: all, or evaluate.limit. new: tokens that are written at most. Words are compared
    in small letters, without punctuation.

    Source: word error rate, as torchmetrics has it; its error is that of a ratio over files.
    """
    from torchmetrics.text import WordErrorRate

    found = sounds("test", path=path)
    chosen = spread(found, limit or preparation.limit)
    truth = [_words(text) for text in found.said(chosen)]
    reader, extractor = preparation.tokenizer, _extractor(preparation.tokenizer)
    if getattr(reader, "tokenizer", None) is None:
        raise ValueError("word-errors are of models that write down what they hear, and here is no tokenizer")

    def measure(subject: Subject) -> dict[str, Figure]:
        wrong, lengths = [], []
        for index, words in zip(chosen, truth, strict=True):
            rate = WordErrorRate()
            rate.update([_words(_written(subject.model, found.heard([index], extractor), reader, new))], [words])
            wrong.append(float(rate.errors))
            lengths.append(float(rate.total))
        value = sum(wrong) / sum(lengths)
        apart = torch.tensor([w - value * n for w, n in zip(wrong, lengths, strict=True)], dtype=torch.float64)
        error = float(apart.std()) / (sum(lengths) / len(lengths)) / math.sqrt(len(lengths)) if len(wrong) > 1 else None
        settings = {"set": path, "files": len(chosen), "new": new}
        return {
            f"{found.name} word errors": Figure(value, error, len(wrong), "files", "lower", settings, "word errors")
        }

    return measure


def _extractor(reader: Any) -> Any:
    found = getattr(reader, "extractor", None)
    if found is None:
        raise ValueError("the model hears nothing: sound-features and word-errors are of models that do")
    return found


@torch.no_grad()
def _places(model: Any, sound: Tensor) -> Tensor:
    """Features of one file's places (places, width), float32 in CPU memory."""
    if not hears(model):
        raise ValueError(f"{type(model).__name__} hears nothing, so there are no features of sound to compare")
    base = chosen_tower(model)
    base = getattr(base, base.base_model_prefix, base) if base.base_model_prefix else base
    base = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else base
    given = {sound_of(base): sound.to(model.device, model.dtype)}
    return base(**given).last_hidden_state[0].float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def _written(model: Any, sound: Tensor, reader: Any, new: int) -> str:
    """What a model writes of one file."""
    if model.can_generate():
        given = {name: each for name, each in given_sound(model, sound).items() if name != "decoder_input_ids"}
        tokens = model.generate(**given, max_new_tokens=new, do_sample=False)[0]
        return str(reader.tokenizer.decode(tokens, skip_special_tokens=True))
    logits = getattr(model(**given_sound(model, sound)), "logits", None)
    if logits is None or logits.dim() != 3:
        raise ValueError(f"{type(model).__name__} writes nothing down, so word-errors have nothing to measure")
    return spelled(logits[0].argmax(-1), reader.tokenizer)


def spelled(tokens: Tensor, tokenizer: Any) -> str:
    """CTC's reading of what stands at each place: of equal tokens in a row one, without blanks (Graves et al. 2006)."""
    if hasattr(tokenizer, "word_delimiter_token"):  # a tokenizer of CTC does so itself
        return str(tokenizer.decode(tokens))
    blank = tokenizer.pad_token_id or 0
    return str(tokenizer.decode([int(token) for token in torch.unique_consecutive(tokens) if int(token) != blank]))


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))
