"""What a run is calibrated on: tokens, pixels, or sound and the tokens that were said."""

from typing import Any, cast

import torch
from torch import Tensor

from sparsekit.data import calibration_images, calibration_sounds, calibration_tokens
from sparsekit.model import Heard, begins_with, channels_of, in_two_parts
from sparsekit.run.plan import Plan

LENGTH = 448  # tokens that are said, at most: Whisper's positions


def calibration_of(planned: Plan, reader: Any, first: int | None) -> Tensor:
    """The calibration tokens (samples, length), pixels (samples, channels, height, width), or sound (samples, ...).

    reader: the tokenizer, the image processor, or a SoundReader. first: the token that stands before every window
    """
    settings = planned.recipe.calibration.model_dump(exclude={"batch"})
    if planned.images:
        return calibration_images(settings, reader, channels_of(planned.config))
    if planned.hears:
        return _heard(planned, reader, settings)
    return calibration_tokens(settings, reader, planned.positions, planned.config.vocab_size, first)


def _heard(planned: Plan, reader: Any, settings: dict[str, Any]) -> Tensor:
    """Sound, and beside it what was said where a decoder is pruned, all of it as long as the shortest text."""
    sound, source, chosen = calibration_sounds(settings, reader.extractor)
    if not in_two_parts(planned.model):
        return sound
    begin, prune = begins_with(planned.model), planned.recipe.prune
    if prune == "encoder" and not source.words:
        return cast(Tensor, Heard(sound, torch.full((len(sound), 1), begin)))
    if reader.tokenizer is None:
        raise ValueError(
            f"{planned.folder} holds no tokenizer, and its decoder is pruned on words: give prune: encoder"
        )
    rows = [reader.tokenizer(text)["input_ids"] for text in source.said(chosen)]
    rows = [row if row[:1] == [begin] else [begin, *row] for row in rows]
    table = getattr(planned.model.config, "max_target_positions", None)
    length = min(table or LENGTH, *map(len, rows))
    largest, embedded = max(token for row in rows for token in row), planned.config.vocab_size
    if largest >= embedded:
        raise ValueError(f"the tokenizer gives token {largest}, but the model embeds {embedded}: they do not fit")
    return cast(Tensor, Heard(sound, torch.tensor([row[:length] for row in rows])))
