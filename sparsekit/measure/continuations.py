"""What a model says: greedy continuations of a few prompts, to be read beside the dense model's."""

from collections.abc import Sequence
from typing import Any

import torch

from sparsekit.data import positions_of

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils when",
    "def is_even(number):",
)


@torch.no_grad()
def samples(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, length: int = 40) -> list[str]:
    """The model's likeliest next tokens after each prompt, with a KV cache; the prompt is not repeated.

    length: tokens at most; fewer where the text ends or the model's position table does.

    Raises:
        ValueError: a prompt is empty, or leaves no room in the position table.
    """
    from transformers import GenerationConfig

    positions = positions_of(model.config)
    device = next(model.parameters()).device
    own = getattr(model, "generation_config", None) or GenerationConfig()
    training = model.training
    model.eval()
    found = []
    try:
        for prompt in prompts:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(device)  # (1, tokens)
            room = length if positions is None else min(length, positions - tokens.shape[1])
            if not tokens.numel() or room < 1:
                raise ValueError(
                    f"the prompt {prompt[:40]!r} has {tokens.shape[1]} tokens and the model {positions} positions; "
                    "give a prompt of at least one token that leaves room to answer"
                )
            end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # one sequence: never used
            greedy = GenerationConfig(do_sample=False, max_new_tokens=room, eos_token_id=end, pad_token_id=pad)
            whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
            found.append(tokenizer.decode(whole[0, tokens.shape[1] :], skip_special_tokens=True))
    finally:
        model.train(training)
    return found
