"""What stands where a part of a layer was removed."""

from typing import Any

import torch
from torch import Tensor, nn


class Nothing(nn.Module):
    """Stands where an attention or an MLP was removed: adds nothing to the residual stream.

    index: the attention's place in the cache of keys and values, where it leaves zeros, since models count there
        how many tokens they have seen; None for an MLP
    residual: the place, among its arguments behind the hidden states, of the residual stream that the module itself
        added to (BLOOM, MPT): it is given back as it is; None: the layer adds to it
    """

    def __init__(self, index: int | None = None, residual: int | None = None):
        super().__init__()
        self.layer_idx, self.residual = index, residual

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the hidden states' shape (batch, length, hidden); for an attention with None for its weights."""
        zeros = torch.zeros_like(hidden_states)
        if self.residual is not None:
            given = kwargs["residual"] if "residual" in kwargs else args[self.residual]
        else:
            given = zeros
        if self.layer_idx is None:
            return given
        for cache in (*args, *kwargs.values()):
            if hasattr(cache, "get_seq_length"):
                nothing = zeros[:, None, :, :1]  # one number for each token: caches take none for "no token yet"
                cache.update(nothing, nothing, self.layer_idx)
        return given, None
