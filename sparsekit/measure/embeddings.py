"""How near a model's embeddings of texts are to the dense model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparsekit.contracts import Count, Figure, Measure, Preparation
from sparsekit.data import corpus, spread
from sparsekit.model import chosen_tower, in_two_parts, predicts_text, read_json, sees_images

if TYPE_CHECKING:
    from sparsekit.contracts import Subject

WORDS = 10  # that a text has at least
# what sentence-transformers calls ways of pooling, in configs of today and of before version 5
MODES = {"mean": "mean", "cls": "first", "lasttoken": "last"}
MODES |= {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def embeddings(
    preparation: Preparation,
    *,
    source: str = "python-docs",
    texts: Count = 200,
    length: Count = 128,
    pooling: Literal["auto", "mean", "first", "last"] = "auto",
) -> Measure:
    """The cosine of text embeddings to the dense model's: of BERT and its like, of sentence-transformers, CLIP's texts,
    and of decoders that embed (Qwen 3 Embedding).

    source: a source of text, or a local file; its test part. texts: so many paragraphs of at least ten words, evenly
    from all. length: tokens that are read of each. pooling: mean, first or last token; auto: what a folder of
    sentence-transformers says, else last of a model that predicts text, else mean. CLIP and SigLIP have their own.

    Source: Reimers and Gurevych 2019, arXiv 1908.10084, section 3 (pooling and cosine).
    """
    if preparation.dense is None:
        raise ValueError(
            "embeddings are compared with the dense model's, and which that is was not said: give --against, or dense="
        )
    dense = preparation.dense
    chosen = sentences(source, texts)
    tokenizer = preparation.tokenizer
    rows = [tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"] for text in chosen]
    folder = Path(str(getattr(preparation.config, "_name_or_path", "") or ""))
    reference: list[Tensor] = []

    def measure(subject: Subject) -> dict[str, Figure]:
        how = _pooling(folder, subject.model) if pooling == "auto" else pooling
        own = _embedded(subject.model, rows, how)
        if not reference:
            reference.append(_embedded(dense(), rows, how))
        near = cosine_similarity(own, reference[0], dim=-1).double()
        error = float(near.std()) / math.sqrt(len(near)) if len(near) > 1 else None
        settings = {"source": source, "length": length, "texts": len(rows), "pooling": how}
        name = f"{Path(source).name} embeddings"
        return {name: Figure(float(near.mean()), error, len(near), "texts", "higher", settings, "embeddings")}

    return measure


def sentences(source: str, count: int) -> list[str]:
    """Paragraphs of at least ten words, evenly from all of a source's. Raises ValueError where there are none."""
    documents = corpus({"source": source}, "test", ()).documents
    paragraphs = [part for document in documents for part in document.split("\n\n")]
    long = [text for text in paragraphs if len(text.split()) >= WORDS]
    if not long:
        raise ValueError(f"{source} has no text of at least {WORDS} words: give another source of text")
    return [long[index] for index in spread(long, count)]


def _pooling(folder: Path, model: Any) -> str:
    if (folder / "1_Pooling" / "config.json").is_file():
        told = read_json(folder / "1_Pooling" / "config.json")
        asked = [key for key in told if key.startswith("pooling_mode_") and told[key] is True]
        modes = [told["pooling_mode"]] if "pooling_mode" in told else asked
        if len(modes) != 1 or modes[0] not in MODES:
            raise ValueError(
                f"{folder}/1_Pooling pools in a way that is not known here: give pooling: mean, first or last"
            )
        return MODES[modes[0]]
    return "last" if predicts_text(model) else "mean"


@torch.no_grad()
def _embedded(model: Any, rows: list[list[int]], pooling: str) -> Tensor:
    """The embedding of each text (texts, width), float32 in CPU memory; one text at a time, so none is padded."""
    if sees_images(model):
        raise ValueError(f"{type(model).__name__} sees images: measure evaluate.features")
    found = []
    for row in rows:
        given = {"input_ids": torch.tensor([row], device=model.device)}
        if hasattr(model, "get_text_features"):
            out = model.get_text_features(**given)
            found.append(getattr(out, "pooler_output", out)[0].float().cpu())
            continue
        inner = model.get_encoder() if in_two_parts(model) else chosen_tower(model)
        inner = getattr(inner, inner.base_model_prefix, inner) if inner.base_model_prefix else inner
        hidden = inner(**given)[0][0]
        whole = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        found.append(whole.float().cpu())
    return torch.stack(found)
