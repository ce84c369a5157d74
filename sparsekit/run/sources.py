"""Where the model of a run comes from: a checkpoint's folder, or memory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sparsekit.model import (
    Checkpoint,
    hears,
    image_processor,
    load,
    load_tokenizer,
    sees_images,
    sound_reader,
)
from sparsekit.walk import digests


@dataclass(frozen=True)
class Source:
    """What a run may ask of its source.

    name: what the model is called
    digest: of its weights: two sources with the same digest hold the same bits
    tokenizer: loads the tokenizer, or image processor; None: there is none
    dense: loads the model that was never pruned; None: it is nowhere to be had
    """

    name: str
    digest: Callable[[], str]
    tokenizer: Callable[[], Any] | None = None
    dense: Callable[[], nn.Module] | None = None


def from_folder(folder: Path, dense: Path, model: nn.Module, *, trust_remote_code: bool = False) -> Source:
    """The checkpoint that a run begins with.

    dense: of the model that was never pruned, which may be the same. model: what is pruned sees, hears or reads
    """
    reader = partial(load_tokenizer, folder, trust_remote_code=trust_remote_code)
    if sees_images(model):
        reader = partial(image_processor, folder)
    elif hears(model):
        reader = partial(sound_reader, folder)
    return Source(
        str(folder),
        digest=lambda: Checkpoint(folder).digest(),
        tokenizer=reader,
        dense=lambda: load(dense, trust_remote_code=trust_remote_code)[0],
    )


def from_memory(model: nn.Module, tokenizer: Any, dense: Callable[[], nn.Module] | None) -> Source:
    """A model that is in memory already. dense: gives a copy of it as it came; None: none was kept."""
    found = digests(model)
    whole = hashlib.sha256("".join(f"{name} {found[name]}\n" for name in sorted(found)).encode()).hexdigest()
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return Source(name, digest=lambda: whole, tokenizer=None if tokenizer is None else lambda: tokenizer, dense=dense)
