"""A language model's head apart from its body: hidden states once, then logits for some places at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import put_forward
from sparsekit.model.entering import body

NUMBERS = 2**25  # of a piece's logits


class Said:
    """What a model makes of tokens (sequences, length): its hidden states, and the logits at some places.

    A model whose head cannot be run apart (it takes no `logits_to_keep`) gives all logits at once.
    hidden_states: of each layer, where they are asked for
    """

    def __init__(self, model: Any, ids: Tensor, positions: Tensor | None = None, *, hidden: bool = False):
        self.model, self.ids = model, ids
        self.base = body(model)
        self.states: Tensor | None = None
        self.all: Tensor | None = None
        if self.base is model:
            out = self._run(positions, hidden)
            self.all = out.logits
        else:
            out = self._without_head(positions, hidden)
            self.states, self.kind = out.last_hidden_state, type(out)
        self.hidden_states: tuple[Tensor, ...] = out.hidden_states if hidden else ()

    def _run(self, positions: Tensor | None, hidden: bool, **options: Any) -> Any:
        options |= {} if positions is None else {"position_ids": positions}
        options |= {"output_hidden_states": True} if hidden else {}
        return self.model(input_ids=self.ids, use_cache=False, **options)

    def _without_head(self, positions: Tensor | None, hidden: bool) -> Any:
        found: list[Any] = []
        original = self.base.forward

        def kept(*args: Any, **kwargs: Any) -> Any:
            found.append(original(*args, **kwargs))
            return found[0]

        undo = put_forward(self.base, kept)
        try:
            first = torch.zeros(1, dtype=torch.long, device=self.ids.device)
            self._run(positions, hidden, logits_to_keep=first)
        finally:
            undo()
        return found[0]

    def places(self, *, last: bool = False, numbers: int | None = None) -> Iterator[Tensor]:
        """The places that something follows, in pieces whose logits are at most so many numbers. last: that one too"""
        device, (sequences, length) = self.ids.device, self.ids.shape
        every = torch.arange(length if last else length - 1, device=device)
        if self.states is None:
            return iter((every,))
        size = (numbers or NUMBERS) // (sequences * self.model.config.get_text_config().vocab_size)
        return iter(every.split(max(16, size)))

    def logits(self, places: Tensor, states: Tensor | None = None) -> Tensor:
        """The logits (sequences, places, vocabulary). states: hidden states there, in place of those that were seen"""
        if self.all is not None:
            return self.all[:, places]
        states = self.states[:, places] if states is None else states  # type: ignore[index]
        out = self.kind(last_hidden_state=states)
        undo = put_forward(self.base, lambda *_, **__: out)
        try:
            logits: Tensor = self.model(input_ids=self.ids[:, places], use_cache=False).logits
            return logits
        finally:
            undo()

    def leaves(self) -> list[nn.Parameter]:
        """What is trained behind the hidden states."""
        inside = {id(parameter) for parameter in self.base.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
