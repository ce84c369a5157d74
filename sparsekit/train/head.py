"""A language model's logits for some tokens at a time, and losses of them whose gradients are taken piece by piece.

A vocabulary's logits are by far the largest tensors of a training step: 12 bytes x tokens x vocabulary with their
softmax and its gradient, where all tokens are looked at together. Here the blocks run once; then, piece after piece,
logits are computed, the loss and its gradient with respect to the hidden states are taken, and the logits are dropped.
Nothing is computed twice, since a sum's gradient is known before the backward pass reaches it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekit.model import Said


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
