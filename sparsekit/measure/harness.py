"""lm-eval's model over blocks that rest on disk: log-likelihoods of all requests by one walk for some lengths."""

from collections.abc import Sequence
from typing import Any

import torch

from sparsekit.measure.predictions import Walked, answers
from sparsekit.model import filled, rests


def harness_for(model: Any, tokenizer: Any, batch: int, walked: Walked) -> Any:
    """The object through which lm-eval asks a model: transformers' of lm-eval, where the model is in memory.

    Where its blocks rest on disk, all sequences that are asked about go through one block after another. Those of which
    none is half as long as the longest, or shorter, are filled up behind their ends, where a causal model does not see
    it, and go together: so blocks are read once for each doubling of length. What must be generated has all blocks in
    memory meanwhile.
    """
    from lm_eval.models.huggingface import HFLM

    class WalkingLM(HFLM):  # type: ignore[misc]
        """lm-eval's own, but for where tokens meet the model."""

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            if self.backend != "causal":  # what is filled up behind an end would be seen
                with filled(walked.blocks, walked.device):
                    whole: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
                return whole
            longest = max(len(ending) for _, _, ending in requests)
            if longest > self.max_length:
                raise ValueError(
                    f"a task asks for an answer of {longest} tokens, and the model has {self.max_length} positions"
                )
            rows = [tuple((context + ending)[-(self.max_length + 1) :]) for _, context, ending in requests]
            found: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
            for alike in _by_length(set(rows)):
                width = len(alike[0])
                ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in alike])
                said = answers(model, ids[:, :-1], ids[:, 1:], batch=batch, walked=walked)
                found |= {row: (each.cpu(), top.cpu()) for row, (each, top) in zip(alike, said, strict=True)}
            scored = []
            for row, (_, _, ending) in zip(rows, requests, strict=True):
                mine = slice(len(row) - 1 - len(ending), len(row) - 1)
                each, top = found[row]
                scored.append((float(each[mine].double().sum()), bool(top[mine].all())))
            return scored

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            with filled(walked.blocks, walked.device):
                said: list[str] = super().generate_until(requests, disable_tqdm)
            return said

    kind = WalkingLM if any(map(rests, walked.blocks)) else HFLM
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _by_length(rows: set[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Sequences, longest first, in groups of which each has none that is half as long as its longest, or shorter."""
    groups: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        if not groups or 2 * len(row) <= len(groups[-1][0]):
            groups.append([])
        groups[-1].append(row)
    return groups
