"""What a model says of each token of a text: its whole forward pass, or block after block where blocks rest on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsekit.model import Block, Said, filled, first_inputs, passed_over, rests
from sparsekit.system import ActivationStore, track

LOGITS = 2**24  # numbers of a vocabulary's logits that are held at once


@dataclass(frozen=True)
class Walked:
    """How a model is gone through whose blocks rest on disk.

    blocks: of the model, as `discover` finds them; none: it is in memory
    activations: bytes of activations in memory; the rest is on disk
    device: where blocks compute; the rest of the model is there already
    """

    blocks: Sequence[Block] = ()
    activations: int = 4 * 10**9
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (frozen)


@torch.no_grad()
def surprises(
    model: Any,
    tokens: Tensor,
    *,
    batch: int = 1,
    walked: "Walked | None" = None,
) -> Iterator[Tensor]:
    """Sequence by sequence the cross-entropy (length - 1,) of each token but the first, in nats, float32.

    tokens: (n, length). batch: sequences per forward pass. The vocabulary's logits are computed for some tokens at a
    time where the model can do that (`logits_to_keep`).
    walked: where its blocks rest on disk, all tokens go through one of them after another, so that each is read once
    """
    for row in _each(model, tokens, tokens[:, 1:], batch, walked, likeliest=False):
        yield row[0]


@torch.no_grad()
def answers(
    model: Any, tokens: Tensor, following: Tensor, *, batch: int = 1, walked: "Walked | None" = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequence by sequence the log-probability (length,) of what follows each token, and whether it is the likeliest.

    tokens, following: (n, length). batch, walked: as in `surprises`
    """
    for loss, likeliest in _each(model, tokens, following, batch, walked, likeliest=True):
        yield -loss, likeliest.bool()


def _each(
    model: Any, tokens: Tensor, following: Tensor, batch: int, walked: "Walked | None", *, likeliest: bool
) -> Iterator[Tensor]:
    """Of each sequence (1 or 2, places): the cross-entropy of what follows, and 1 where that is the likeliest."""
    known = list(walked.blocks) if walked else []
    chunks = list(zip(tokens.split(batch), following.split(batch), strict=True))
    if walked is None or not any(map(rests, known)):
        device = next(model.parameters()).device
        for chunk, after in track(chunks, "measuring"):
            yield from _of_chunk(model, chunk.to(device), after.to(device), likeliest)
        return
    device = walked.device
    store = ActivationStore(walked.activations)
    try:
        for hidden in first_inputs(model, known, tokens.to(device), batch):
            store.append(hidden)
        for block in track(known, "measuring, block by block"):
            with filled([block], device):
                for index, hidden in enumerate(store):
                    store[index] = block(hidden)
        for (chunk, after), hidden in zip(chunks, store, strict=True):
            with passed_over(known, hidden.to(device)):
                found = list(_of_chunk(model, chunk.to(device), after.to(device), likeliest))
            yield from found  # whoever gets it may run the model
    finally:
        store.close()


def _of_chunk(model: Any, chunk: Tensor, following: Tensor, likeliest: bool) -> Iterator[Tensor]:
    said, parts = Said(model, chunk), []
    for places in said.places(last=following.shape == chunk.shape, numbers=LOGITS):
        for each, after in zip(said.logits(places), following[:, places], strict=True):
            loss = cross_entropy(each.float(), after, reduction="none")
            parts.append(torch.stack([loss, (each.argmax(-1) == after).float()] if likeliest else [loss]))
    for row in range(len(chunk)):
        yield torch.cat(parts[row :: len(chunk)], -1)
