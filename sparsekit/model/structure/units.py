"""What can be removed from a decoder model: KV groups, MLP channels, whole attention or MLP parts, whole layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, Linear, linears_of
from sparsekit.model.structure.experts import ExpertCount, count_experts
from sparsekit.model.structure.nothing import Nothing

COUNTS = ("num_heads", "num_attention_heads")  # what attention modules call the number of their query heads
KINDS = ("heads", "channels", "attention", "mlp", "layers", "experts")
TOGETHER = ({"heads", "channels"}, {"attention", "mlp"}, {"layers"}, {"experts"})  # kinds that may be removed together
# what linears do, by the last part of their names: those that make a part's units, and the one that reads them
ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
    (("c_attn",), ("c_proj",)),  # GPT-2: q, k and v one after another
    (("qkv",), ("proj",)),  # SAM: the same
    (("query_key_value",), ("dense",)),  # GPT-NeoX: head by head
)
MLPS = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("up_proj",), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),  # Phi-3, GLM: gate and up one after another
    (("fc1",), ("fc2",)),
    (("fc_in",), ("fc_out",)),  # GPT-J, CodeGen
    (("lin1",), ("lin2",)),  # SAM
    (("w1", "w3"), ("w2",)),  # LFM2
    (("c_fc",), ("c_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
)


@dataclass(frozen=True, eq=False)
class Part:
    """Units of one kind in one block. Where the kind is a whole part or layer, there is one unit.

    inputs: linear's name -> the rows (units, rows of each) that make the units: of q, k and v, or of gate and up
    output: the linear whose columns read them, o or down; None for a whole layer
    columns: of `output` (units, columns of each)
    parameters: that go with one unit, rows' biases included
    home: of experts, the name of their module, and what else has a place for each of them; of others empty
    """

    block: int
    kind: str
    count: int
    parameters: int
    inputs: dict[str, Tensor]
    output: str | None
    columns: Tensor
    home: str = ""
    experts: ExpertCount | None = None

    @property
    def least(self) -> int:
        """How many must stay, whatever the scores: as many experts as each token is sent to."""
        return 0 if self.experts is None else self.experts.least


@dataclass(frozen=True)
class Units:
    """All units of a model, numbered part by part. A mask over them is a tensor (units,), true where a unit is kept."""

    parts: tuple[Part, ...]
    total: int  # parameters of all blocks

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @cached_property
    def parameters(self) -> Tensor:
        """Of each unit (units,), int64."""
        return self._spread([part.parameters for part in self.parts])

    @cached_property
    def block(self) -> Tensor:
        """The index of each unit's block (units,)."""
        return self._spread([part.block for part in self.parts])

    @cached_property
    def part(self) -> Tensor:
        """The number of each unit's part (units,)."""
        return self._spread(list(range(len(self.parts))))

    @cached_property
    def kind(self) -> Tensor:
        """The number, in `kinds`, of each unit's kind (units,)."""
        return self._spread([self.kinds.index(part.kind) for part in self.parts])

    def of(self, kind: str) -> Tensor:
        """Whether each unit is of a kind (units,)."""
        return self._spread([part.kind == kind for part in self.parts])

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds that occur."""
        return sorted({part.kind for part in self.parts}, key=KINDS.index)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of all units (units, ...) part by part."""
        return list(values.split([part.count for part in self.parts]))

    def removed(self, kept: Tensor) -> float:
        """The share of the blocks' parameters that a mask removes."""
        return int(self.parameters[~kept].sum()) / self.total

    def _spread(self, values: list[Any]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor([part.count for part in self.parts]))


class NoPart(ValueError):
    """A block has no part of a kind that is known; the message says what it has."""


def find_units(model: nn.Module, blocks: Sequence[Block], kinds: Sequence[str] = ("heads", "channels")) -> Units:
    """The units of these kinds in a model's blocks, of parts that are still there. Works on the meta device.

    Raises:
        ValueError: kinds that are unknown or cannot be removed together, or a block whose linears have other roles
            than in LLaMA, Mistral, Qwen, Gemma, Phi, OPT, GPT-2 and GPT-NeoX; or layers that know their number.
    """
    check_kinds(kinds)
    config: Any = getattr(model, "config", None)
    if "layers" in kinds and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            f"this {type(model).__name__} divides attention by the layer's number (scale_attn_by_inverse_layer_idx): "
            "no layer can be removed without changing those after it, choose other units"
        )
    if "experts" in kinds:
        counted = count_experts(model, blocks)
        found = [_experts(block, home, counted) for block in blocks for home in block.experts]
        return Units(tuple(found), sum(p.numel() for block in blocks for p in block.module.parameters()))
    parts: list[Part] = []
    lacking: dict[str, ValueError] = {}
    for block in blocks:
        parameters = sum(parameter.numel() for parameter in block.module.parameters())
        for kind in sorted(kinds, key=KINDS.index):
            if kind == "layers" and block.fixed:
                continue
            if kind == "layers":
                parts.append(Part(block.index, kind, 1, parameters, {}, None, torch.empty(1, 0, dtype=torch.long)))
            elif not _gone(block, attention := kind in ("heads", "attention")):
                try:
                    parts.append(_heads(model, block, kind) if attention else _channels(block, kind))
                except NoPart as reason:  # a mixture of experts, a Mamba block: others may have them
                    lacking.setdefault(kind, reason)
    if "layers" in kinds and not parts:
        raise ValueError(f"no layer of {type(model).__name__} can be dropped: its config could not say that it is gone")
    for kind, first in lacking.items():
        if not any(part.kind == kind for part in parts):
            raise first
    return Units(tuple(parts), sum(p.numel() for block in blocks for p in block.module.parameters()))


def _experts(block: Block, home: str, counted: ExpertCount) -> Part:
    mine, experts = counted.of(block), block.experts[home]
    tensors = dict(block.module.named_parameters()) | dict(block.module.named_buffers())
    rows = sum(tensors[name][0].numel() for name in mine.rows if isinstance(tensors[name], nn.Parameter))
    each = sum(p.numel() for p in experts.get_submodule("0").parameters()) + rows
    nothing = torch.empty(experts.count, 0, dtype=torch.long)
    return Part(block.index, "experts", experts.count, each, {}, None, nothing, f"{block.name}.{home}", mine)


def _gone(block: Block, attention: bool) -> bool:
    """Whether the attention, or the MLP, was removed before."""
    left = [module for module in block.module.modules() if isinstance(module, Nothing)]
    return any((module.layer_idx is not None) == attention for module in left)


NAMED = {"heads-and-channels": ["heads", "channels"], "parts": ["attention", "mlp"]}


def kinds_of(units: str | Sequence[str]) -> list[str]:
    """The kinds of units that an option names: "heads-and-channels", "parts", a kind, or a list of kinds.

    Raises ValueError for kinds that are unknown or cannot be removed together.
    """
    kinds = NAMED.get(units, [units]) if isinstance(units, str) else list(units)
    check_kinds(kinds)
    return kinds


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ValueError unless these kinds of units exist and can be removed together."""
    if not kinds or not any(set(kinds) <= each for each in TOGETHER):
        raise ValueError(
            f"units are {', '.join(kinds) or 'none'}; they can be heads and channels, attention and mlp, layers, "
            "or experts"
        )


BY_QUERY = "sparsekit_heads_by_query"  # on a model: how its heads were counted when some were cut out, so they go on


def by_query(part: Part) -> bool:
    """Whether the heads of an attention are its queries, which all share one key: q alone has rows of theirs."""
    return [rows.shape[1] == part.columns.shape[1] for rows in part.inputs.values()] == [True]


def head_size(attention: Any, width: int) -> int | None:
    """The columns of one head; width: of all. None where an attention says neither that nor how many heads it has."""
    said = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if isinstance(said, int):
        return said
    heads = next((getattr(attention, name) for name in COUNTS if hasattr(attention, name)), None)
    return width // heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else None


def _heads(model: nn.Module, block: Block, kind: str) -> Part:
    inputs, output, home = _roles(block, ATTENTIONS, "attention")
    module = block.module.get_submodule(home)
    size = head_size(module, output.shape[1])
    if size is None:
        raise ValueError(f"{block.name}.{home} does not say how large its heads are (head_dim), so none can be removed")
    queries = output.shape[1] // size
    if len(inputs) == 3:
        groups = inputs[1].shape[0] // size
        asked = getattr(model, BY_QUERY, None)
        if groups == 1 and kind == "heads" and (queries > 1 if asked is None else asked):  # the key stays
            return _part(block, kind, "heads", {inputs[0].name: _ranges(queries, size)}, output, _ranges(queries, size))
        each = queries // groups * size  # rows of q that share a row of k and v
        rows = {linear.name: _ranges(groups, linear.shape[0] // groups) for linear in inputs}
    else:
        groups, each = queries, size
        [fused] = inputs
        if fused.name.endswith(("c_attn", ".qkv")):
            rows = {fused.name: torch.cat([_ranges(groups, size) + third * groups * size for third in range(3)], 1)}
        else:
            rows = {fused.name: _ranges(groups, 3 * size)}
        if fused.shape[0] != 3 * groups * size:
            raise ValueError(f"{fused.name} has {fused.shape[0]} rows, not 3 for each of {groups} heads of {size}")
    for name, norm in module.named_parameters():
        if "norm" in name and norm.numel() != size:
            raise ValueError(f"{block.name}.{home}.{name} normalises all heads together, so none can be removed alone")
    return _part(block, kind, "heads", rows, output, _ranges(groups, each))


def _channels(block: Block, kind: str) -> Part:
    inputs, output, home = _roles(block, MLPS, "MLP")
    count = output.shape[1]
    for name, norm in block.module.get_submodule(home).named_parameters() if home else ():
        if "norm" in name and norm.numel() == count:
            raise ValueError(f"{block.name}.{home}.{name} normalises all channels together, so none can go alone")
    rows = {linear.name: torch.arange(count)[:, None] for linear in inputs}
    [*others, last] = inputs
    if not others and last.name.endswith("gate_up_proj") and last.shape[0] == 2 * count:
        rows = {last.name: torch.stack([torch.arange(count), torch.arange(count) + count], 1)}
    elif any(linear.shape[0] != count for linear in inputs):
        raise ValueError(f"{output.name} reads {count} channels, which is not what {inputs[0].name} makes")
    return _part(block, kind, "channels", rows, output, torch.arange(count)[:, None])


def _part(block: Block, kind: str, finest: str, rows: dict[str, Tensor], output: Linear, columns: Tensor) -> Part:
    count, width = columns.shape
    parameters = output.shape[0] * width
    for name, each in rows.items():
        linear = block.linears[name]
        parameters += each.shape[1] * (linear.shape[1] + (_bias(linear) is not None))
    if kind == finest:
        return Part(block.index, kind, count, parameters, rows, output.name, columns)
    whole = {name: each.reshape(1, -1) for name, each in rows.items()}
    bias = _bias(output)
    parameters = parameters * count + (0 if bias is None else bias.numel())
    return Part(block.index, kind, 1, parameters, whole, output.name, columns.reshape(1, -1))


def _bias(linear: Linear) -> Tensor | None:
    return getattr(linear.module, "bias", None)


def _ranges(count: int, width: int) -> Tensor:
    return torch.arange(count * width).view(count, width)


def _roles(
    block: Block, known: Sequence[tuple[Sequence[str], Sequence[str]]], what: str
) -> tuple[list[Linear], Linear, str]:
    """The linears that make the units, the one that reads them, and the module they are in."""
    homes: dict[str, dict[str, Linear]] = {}
    for inner, _ in linears_of(block.module):
        home, _, last = inner.rpartition(".")
        expert = any(inner.startswith(f"{name}.") for name in block.experts)
        if (full := f"{block.name}.{inner}") in block.linears and not expert:
            homes.setdefault(home, {})[last] = block.linears[full]
    for home, linears in homes.items():
        for inputs, outputs in known:
            output = [linears[name] for name in outputs if name in linears]
            if output and all(name in linears for name in inputs):
                return [linears[name] for name in inputs], output[0], home
    raise NoPart(
        f"{block.name} has no {what} whose linears sparsekit knows: it has "
        f"{', '.join(sorted(name.removeprefix(f'{block.name}.') for name in block.linears))}; structures can be "
        "removed from models built like LLaMA, Mistral, Qwen, Gemma, Phi, OPT, GPT-2 or GPT-NeoX"
    )
