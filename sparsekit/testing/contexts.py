"""A small real context: what a run would give a stage or a criterion, around a model in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.maths import Pattern, parse
from sparsekit.model import discover, split_experts
from sparsekit.model.structure import TOGETHER
from sparsekit.run import Context


def tiny_model(seed: int = 0, kv_heads: int = 2) -> nn.Module:
    """A random LLaMA of three layers of width 32, with four heads in groups; nothing is read from disk."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=96,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # so that a prediction depends on what is read
    return model


def tiny_experts(seed: int = 0) -> nn.Module:
    """A random mixture of experts (Mixtral) of two layers of width 32, with eight experts of which a token has two."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    split_experts(model)
    return model


def tiny_mamba(seed: int = 0) -> nn.Module:
    """A random Mamba of two layers of width 32."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4, vocab_size=96, bos_token_id=0
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(5)
    return model


def kinds_in_one_model(kinds: Iterable[str]) -> list[list[str]]:
    """Kinds of units that can be removed together, and that one of the tiny models has together."""
    sets = [together & set(kinds) - {"mamba"} for together in TOGETHER] + [{"mamba"} & set(kinds)]
    return [sorted(each) for each in sets if each]


def tiny_tokens(sequences: int = 8, length: int = 16, seed: int = 1) -> Tensor:
    """Random tokens (sequences, length) for `tiny_model`."""
    return torch.randint(1, 96, (sequences, length), generator=torch.Generator().manual_seed(seed))


class Kept:
    """Masks of an earlier stage, held in memory: a linear's name -> kept (out, in)."""

    def __init__(self, masks: Mapping[str, Tensor]):
        self.kept = dict(masks)

    def masks(self, block: Any) -> dict[str, Tensor]:
        """A block's masks as packed bits, as committed blocks give them."""
        from sparsekit.system import pack

        return {name: pack(self.kept[name]) for name in block.linears if name in self.kept}


def context(
    model: nn.Module,
    tokens: Tensor,
    folder: str | Path,
    *,
    pattern: str | Pattern | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    **fields: Any,
) -> Context:
    """A context around a model in memory, whose blocks are discovered here.

    tokens: calibration tokens (sequences, length). folder: of the run; a stage may write there
    pattern: that every linear is to get. masks: of an earlier stage, by linear's name (out, in)
    fields: others of `sparsekit.run.Context`, such as seed, batch, calibration or error_correction
    """
    blocks = discover(model, tokens[:1, :8])
    names = [name for block in blocks for name in block.linears]
    if tokenizer is not None:
        fields["load_tokenizer"] = lambda: tokenizer
    if masks is not None:
        fields |= {"before": Kept(masks), "index": 1}
    return Context(
        model,
        blocks,
        tokens,
        Path(folder),
        patterns=dict.fromkeys(names, parse(pattern)) if pattern is not None else {},
        **fields,
    )


def begin(stage: Any, here: Context, **options: Any) -> Any:
    """Call a stage as a run does: its options are checked by their types, then together, then it gets ready.

    Raises ValueError for the first that is wrong.
    """
    from sparsekit import registry

    for problem in registry.option_problems(stage, options).values():
        raise ValueError(problem)
    defaults = {name: parameter.default for name, parameter in registry.options(stage).items()}
    getattr(stage, "check", lambda _: None)(defaults | options)
    return stage(here, **options)
