"""The heads of attentions: which rows and columns are theirs, and how an attention is told how many it has."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.linears import Linear
from sparsekit.model.structure.roles import NoPart, Roles, norms_of, part_of, ranges, roles
from sparsekit.model.structure.units import Part

# what attention modules call the number of their query heads, that of their keys, and the width of all heads together
COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
KEYS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("embed_dim", "split_size")
ATTENTIONS: Roles = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense", "Wo")),
    (("q_b_proj", "kv_b_proj"), ("o_proj",)),  # latent attention (MLA): heads are made of what is stored of a token
    (("q_proj", "kv_b_proj"), ("o_proj",)),
    (("c_attn",), ("c_proj",)),  # GPT-2
    (("qkv",), ("proj",)),  # SAM
    (("qkv_proj",), ("o_proj",)),  # Phi-3
    (("Wqkv",), ("out_proj",)),  # DBRX, MPT
    (("query_key_value",), ("dense",)),  # GPT-NeoX, Falcon
)
# fused linears with all of q, all of k, all of v; others go from group to group
IN_TURN = ("c_attn", "qkv", "qkv_proj", "Wqkv")
GATES = ("gate_proj", "g_proj", "output_gate")  # linears in an attention that make what multiplies its heads' outputs
BY_QUERY = "sparsekit_heads_by_query"  # on a model: how its heads were counted when some were cut out, so they go on


def head_size(attention: Any, width: int) -> int | None:
    """The columns of one head; width: of all. None where an attention says neither that nor how many heads it has."""
    for name in ("v_head_dim", "head_dim", "head_size"):
        if isinstance(said := getattr(attention, name, None), int):
            return said
    heads = next((getattr(attention, name) for name in COUNTS if hasattr(attention, name)), None)
    return width // heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else None


def heads_of(model: nn.Module, block: Block, kind: str) -> Part:
    """The heads of a block's attention, or the attention as a whole.

    Queries that share a key go together; where all share one, each query is a unit, and the key stays.

    Raises:
        NoPart: there is none that is known.
        ValueError: no head can be removed alone, or the linears are not what the attention says.
    """
    inputs, output, home = roles(block, ATTENTIONS, "attention")
    module = block.module.get_submodule(home)
    if any(isinstance(inner, nn.Conv1d) for inner in module.modules()):
        raise NoPart(f"{block.name}.{home} has a convolution over its heads, which sparsekit cannot cut yet")
    size = head_size(module, output.shape[1])
    if size is None:
        raise ValueError(f"{block.name}.{home} does not say how large its heads are (head_dim), so none can be removed")
    queries = output.shape[1] // size
    groups = _groups(inputs, queries, size)
    asked = getattr(model, BY_QUERY, None)
    one_key = groups == 1 and kind == "heads" and (queries > 1 if asked is None else asked)  # the key stays
    count = queries if one_key else groups
    staying = {}
    if one_key:
        rows = {inputs[0].name: ranges(queries, size)}  # of a fused linear the first: q comes before k and v
        if len(inputs) == 1:
            staying = {inputs[0].name: torch.arange(queries * size, inputs[0].shape[0])}
    elif len(inputs) == 1:
        rows = {inputs[0].name: _fused(inputs[0], module, queries, groups, size)}
    else:
        rows = {linear.name: ranges(groups, linear.shape[0] // groups) for linear in inputs}
    wide = {block.linears[name].shape[0]: each for name, each in rows.items()}
    wide |= {queries * size: ranges(count, queries // count * size), groups * size: ranges(groups, size)}
    norms = norms_of(block, home, wide, size)
    for linear in _gates(block, home, inputs, queries):
        rows[linear.name] = ranges(count, linear.shape[0] // count)
    beside = {  # sinks: a number for each query
        f"{block.name}.{home}.{name}": ranges(count, queries // count)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() and parameter.shape[0] == queries
    }
    columns = ranges(count, output.shape[1] // count)
    return part_of(
        block, kind, "heads", rows, output, columns, beside=beside, norms=norms, staying=staying, one_key=one_key
    )


def count_heads(attention: Any, heads: int, size: int, width: int, one_key: bool) -> None:
    """Tell an attention how many query heads it has now. How many of them share a key changes where all share one.

    size: of a head; width: of all heads before
    """
    before = next((getattr(attention, name) for name in COUNTS if hasattr(attention, name)), None)
    if before is None and hasattr(attention, "qkv_proj"):
        attention.config = copy(attention.config)  # Phi-3 asks its config where q ends
        attention.config.num_attention_heads = heads
    for name in COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, heads)
    if one_key and hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads
    for name in KEYS:
        if hasattr(attention, name) and not one_key:
            shared = getattr(attention, "num_key_value_groups", None)
            shared = shared or (before or heads) // getattr(attention, name)
            setattr(attention, name, heads // shared)
    for name in WIDTHS:
        if getattr(attention, name, None) == width:
            setattr(attention, name, heads * size)


def _groups(inputs: list[Linear], queries: int, size: int) -> int:
    """How many keys the queries share."""
    if len(inputs) == 3:
        return inputs[1].shape[0] // size
    if len(inputs) == 2:  # every head has its own, made of the latent one
        return queries
    [fused] = inputs
    groups = (fused.shape[0] // size - queries) // 2
    if groups < 1 or queries % groups or fused.shape[0] != (queries + 2 * groups) * size:
        raise ValueError(f"{fused.name} has {fused.shape[0]} rows, no q, k and v of {queries} heads of {size}")
    return groups


def _fused(fused: Linear, module: nn.Module, queries: int, groups: int, size: int) -> Tensor:
    """The rows of q, k and v in one linear (groups, rows of each)."""
    own = hasattr(module, "kv_dim") and groups == queries  # GPT-BigCode: head by head, though it says c_attn
    if not fused.name.endswith(tuple(f".{name}" for name in IN_TURN)) or own:
        return ranges(groups, (queries // groups + 2) * size)
    key = ranges(groups, size) + queries * size
    return torch.cat([ranges(groups, queries // groups * size), key, key + groups * size], 1)


def _gates(block: Block, home: str, inputs: list[Linear], queries: int) -> list[Linear]:
    """Linears that make what multiplies each head's output."""
    inside = {name.removeprefix(f"{block.name}.{home}."): linear for name, linear in block.linears.items()}
    made = {linear.name for linear in inputs}
    return [
        linear
        for name, linear in inside.items()
        if name in GATES and linear.name not in made and linear.shape[0] % queries == 0
    ]
