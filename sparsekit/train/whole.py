"""The whole model's loss, and its gradients, without labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekit.model import Said, features
from sparsekit.train.head import summed
from sparsekit.train.losses import text_loss


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While this lasts, no gradient of any parameter is computed; those of what else is asked for still are."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()


@torch.enable_grad()
def backward(model: Any, tokens: Tensor) -> None:
    """Gradients of the loss of `tokens` (sequences, length), summed over sequences, each the mean over its tokens.

    Of images (images, channels, height, width): see `loss_of_images`.
    """
    if tokens.is_floating_point():
        loss_of_images(model, tokens.to(next(model.parameters()).dtype)).backward()
        return
    loss = summed(Said(model, tokens), lambda logits, places: text_loss(logits, tokens[:, places + 1]))
    loss = loss / (tokens.shape[1] - 1)
    if not loss.isfinite():
        raise ValueError("the model's loss is NaN or Inf, so it has no gradients; run it in float32 or bfloat16")
    loss.backward()


def loss_of_images(model: Any, pixels: Tensor) -> Tensor:
    """The cross-entropy of the class that the model itself finds likeliest, summed over images; of a model that names
    no classes half the energy of its features, the mean over places."""
    logits = getattr(model(pixel_values=pixels), "logits", None) if hasattr(model, "num_labels") else None
    if logits is not None and logits.dim() == 2:
        return cross_entropy(logits.float(), logits.argmax(1), reduction="sum")
    return features(model, pixels)[1].float().square().sum(-1).flatten(1).mean(1).sum() / 2
