"""A language model's logits for some tokens at a time, and losses of them whose gradients are taken piece by piece.

A vocabulary's logits are by far the largest tensors of a training step: 12 bytes x tokens x vocabulary with their
softmax and its gradient, where all tokens are looked at together. Here the blocks run once; then, piece after piece,
logits are computed, the loss and its gradient with respect to the hidden states are taken, and the logits are dropped.
Nothing is computed twice, since a sum's gradient is known before the backward pass reaches it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model import body, put_forward
from sparsekit.train.rows import forward

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
            out = forward(model, ids, positions, output_hidden_states=hidden)
            self.all = out.logits
        else:
            out = self._without_head(positions, hidden)
            self.states, self.kind = out.last_hidden_state, type(out)
        self.hidden_states: tuple[Tensor, ...] = out.hidden_states if hidden else ()

    def _without_head(self, positions: Tensor | None, hidden: bool) -> Any:
        found: list[Any] = []
        original = self.base.forward

        def kept(*args: Any, **kwargs: Any) -> Any:
            found.append(original(*args, **kwargs))
            return found[0]

        undo = put_forward(self.base, kept)
        try:
            first = torch.zeros(1, dtype=torch.long, device=self.ids.device)
            forward(self.model, self.ids, positions, output_hidden_states=hidden, logits_to_keep=first)
        finally:
            undo()
        return found[0]

    def places(self, *, last: bool = False) -> Iterator[Tensor]:
        """The places that something follows, in pieces whose logits are at most so many numbers. last: that one too"""
        device, (sequences, length) = self.ids.device, self.ids.shape
        every = torch.arange(length if last else length - 1, device=device)
        size = NUMBERS // (sequences * self.model.config.get_text_config().vocab_size)
        return iter(every.split(max(16, size) if self.states is not None else length))

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


def summed(said: Said, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum over all places of `loss(logits, places)`, itself a sum; differentiable once.

    loss: of logits (sequences, places, vocabulary) at these places
    """
    if said.all is not None or not torch.is_grad_enabled():
        return torch.stack([loss(said.logits(places), places) for places in said.places()]).sum()
    found: Tensor = _InPieces.apply(said, loss, said.states, *said.leaves())  # type: ignore[no-untyped-call]
    return found


class _InPieces(torch.autograd.Function):
    """The loss, with its gradients taken as the pieces come."""

    @staticmethod
    def forward(ctx: Any, said: Said, loss: Any, states: Tensor, *leaves: Tensor) -> Tensor:
        towards = [torch.zeros_like(states), *map(torch.zeros_like, leaves)]
        total = states.new_zeros((), dtype=torch.float32)
        for places in said.places():
            with torch.enable_grad():
                piece = states[:, places].detach().requires_grad_()
                part = loss(said.logits(places, piece), places)
                first, *others = torch.autograd.grad(part, [piece, *leaves], allow_unused=True)
            towards[0][:, places] = first
            for gradient, other in zip(towards[1:], others, strict=True):
                gradient += 0 if other is None else other
            total += part.detach()
        ctx.save_for_backward(*towards)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(gradients[0].to(each.dtype) * each for each in ctx.saved_tensors)
