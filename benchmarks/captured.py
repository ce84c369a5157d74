"""Layers of a real model with the statistics of their dense inputs, on calibration text and on held-out text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsekit.data import Corpus, check_length, resolve, sample
from sparsekit.maths import Stats
from sparsekit.model import discover, first_inputs, load_plain, locate
from sparsekit.run import BATCH_TOKENS, SAMPLE_LENGTH
from sparsekit.system import write_atomically, write_tensors

HELD_OUT = 5  # one in so many documents of a local file, the last ones, is not calibrated on
PARTS = ("gram", "total", "tokens")


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor: name -> dense weight (out, in), and what is known of that tensor."""

    weights: dict[str, Tensor]
    stats: Stats
    held_out: Stats

    def fresh(self) -> Stats:
        """The calibration statistics with an empty cache."""
        return _stats(self.stats.gram, self.stats.total, self.stats.tokens)

    def to(self, device: torch.device | str) -> "Group":
        """The same on another device."""
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        pair = (_stats(*(t.to(device) for t in _parts(stats))) for stats in (self.stats, self.held_out))
        return Group(weights, *pair)


def capture(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> list[Group]:
    """Load a model and walk, dense, as far as the last block asked for.

    settings: model and text as in a recipe; blocks: their numbers; samples and held_out: sequences; length; seed.
    Raises ValueError if model, text or blocks are not there, or the text is too short.
    """
    folder = locate(settings["model"])
    trust = isinstance(settings["model"], dict) and bool(settings["model"].get("trust_remote_code"))
    model, tokenizer = load_plain(folder, trust_remote_code=trust)
    model.to(device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    check_length(settings["length"], positions, "calibration")
    calibration, held_out = split(settings["text"])
    cut = {"length": settings["length"], "seed": settings["seed"]}
    seen = inputs(model, sample(calibration, tokenizer, samples=settings["samples"], **cut), settings["blocks"])
    other = inputs(model, sample(held_out, tokenizer, samples=settings["held_out"], **cut), settings["blocks"])
    return [Group(weights, stats, other[names][1]) for names, (weights, stats) in seen.items()]


def split(text: str | Mapping[str, Any]) -> tuple[Corpus, Corpus]:
    """Text to calibrate on, and text of the same kind that is held out.

    Held out is the source's test text, cut as its calibration text is. Where that is the same text, as with a local
    file, it is the last fifth of the documents, and the others are the calibration text.

    Raises:
        ValueError: there is no such source, or a local file is a single document.
    """
    settings = {"source": text} if isinstance(text, str) else text
    function, options = resolve(settings)
    corpus, test = (function(part, **options) for part in ("calibration", "test"))
    count = len(corpus.documents)
    if count != len(test.documents) or list(corpus.documents) != list(test.documents):
        return corpus, replace(corpus, documents=test.documents)
    cut = count * (HELD_OUT - 1) // HELD_OUT
    if cut == 0:
        raise ValueError(f"{corpus.name} is one document; text that is held out needs several")
    return replace(corpus, documents=corpus.documents[:cut]), replace(corpus, documents=corpus.documents[cut:])


@torch.no_grad()
def inputs(
    model: nn.Module, tokens: Tensor, wanted: Sequence[int]
) -> dict[tuple[str, ...], tuple[dict[str, Tensor], Stats]]:
    """Names of each group's linears -> their weights in fp32 and the statistics of their inputs, for these blocks."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    blocks = discover(model, tokens[:1, :SAMPLE_LENGTH])
    if wrong := [index for index in wanted if not 0 <= index < len(blocks)]:
        raise ValueError(f"there is no block {wrong[0]}: the model's {len(blocks)} blocks count from 0")
    blocks = blocks[: max(wanted) + 1]
    chunks = list(first_inputs(model, blocks, tokens, max(1, BATCH_TOKENS // tokens.shape[1])))
    found = {}
    for block in blocks:
        groups = range(len(block.groups)) if block.index in wanted else ()
        stats = [Stats(block.linears[block.groups[group][0]].shape[1], device) for group in groups]

        def see(group: int, x: Tensor, stats: list[Stats] = stats) -> None:
            stats[group].add(x)

        with block.watching(groups, see):
            chunks = [block(chunk) for chunk in chunks]
        for group in groups:
            stats[group].check(block.groups[group][0])
            weights = {name: block.linears[name].weight.float().contiguous() for name in block.groups[group]}
            found[tuple(weights)] = (weights, stats[group])
    return found


def cached(file: Path, settings: Mapping[str, Any]) -> list[Group]:
    """The same from a file that an earlier call wrote, or captured now and written to it.

    Raises ValueError if the file holds layers of other settings.
    """
    if not file.is_file():
        groups = capture(settings)
        tensors = {name: weight for group in groups for name, weight in group.weights.items()}
        for number, group in enumerate(groups):
            for kind, stats in (("stats", group.stats), ("held_out", group.held_out)):
                tensors |= {f"{number}.{kind}.{part}": t for part, t in zip(PARTS, _parts(stats), strict=True)}
        names = json.dumps([list(group.weights) for group in groups])
        metadata = {"settings": json.dumps(settings), "groups": names}
        write_atomically(file, lambda aside: write_tensors(aside, tensors, metadata))
        return groups
    with safe_open(file, framework="pt") as handle:
        known = handle.metadata() or {}
        if json.loads(known.get("settings", "null")) != settings:
            raise ValueError(f"{file} holds layers of other settings ({known.get('settings')}); give another file")

        def kept(number: int, kind: str) -> Stats:
            return _stats(*(handle.get_tensor(f"{number}.{kind}.{part}") for part in PARTS))

        return [
            Group({name: handle.get_tensor(name) for name in names}, kept(i, "stats"), kept(i, "held_out"))
            for i, names in enumerate(json.loads(known["groups"]))
        ]


def _parts(stats: Stats) -> tuple[Tensor, Tensor, Tensor]:
    return stats.gram, stats.total, stats.tokens


def _stats(gram: Tensor, total: Tensor, tokens: Tensor) -> Stats:
    stats = Stats(1, gram.device)
    stats.gram, stats.total, stats.tokens = gram, total, tokens
    return stats
