"""What stands where a part of a layer was removed."""

from typing import Any

import torch
from torch import Tensor, nn


class Nothing(nn.Module):
    """Stands where an attention or an MLP was removed: adds nothing to the residual stream.

    index: the attention's place in the cache of keys and values, where it leaves zeros, since models count there
        how many tokens they have seen; None for an MLP
    """

    def __init__(self, index: int | None = None):
        super().__init__()
        self.layer_idx = index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the hidden states' shape (batch, length, hidden); for an attention with None for its weights."""
        zeros = torch.zeros_like(hidden_states)
        if self.layer_idx is None:
            return zeros
        for cache in (*args, *kwargs.values()):
            if hasattr(cache, "get_seq_length"):
                nothing = zeros[:, None, :, :1]  # one number for each token: caches take none for "no token yet"
                cache.update(nothing, nothing, self.layer_idx)
        return zeros, None
