"""What the linears of a block do, by the last part of their names; the channels of MLPs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.linears import Linear, linears_of
from sparsekit.model.structure.units import Part

Roles = Sequence[tuple[Sequence[str], Sequence[str]]]  # those that make a part's units, and the one that reads them
MLPS: Roles = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("up_proj",), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),  # Phi-3, GLM: gate and up one after another
    (("fc1",), ("fc2",)),
    (("fc_in",), ("fc_out",)),  # GPT-J, CodeGen
    (("lin1",), ("lin2",)),  # SAM
    (("w1", "w3"), ("w2",)),  # LFM2
    (("c_fc",), ("c_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
    (("input_linear",), ("output_linear",)),  # Granite's shared MLP: gate and up one after another
    (("Wi",), ("Wo",)),  # ModernBERT: gate and up one after another
)


class NoPart(ValueError):
    """A block has no part of a kind that is known; the message says what it has."""


def channels_of(block: Block, kind: str) -> Part:
    """The channels of a block's MLP, or the MLP as a whole.

    Raises:
        NoPart: there is none that is known.
        ValueError: no channel can be removed alone.
    """
    inputs, output, home = roles(block, MLPS, "MLP")
    count = output.shape[1]
    rows = {linear.name: torch.arange(count)[:, None] for linear in inputs}
    [*others, last] = inputs
    if not others and last.shape[0] == 2 * count:
        rows = {last.name: torch.stack([torch.arange(count), torch.arange(count) + count], 1)}
    elif any(linear.shape[0] != count for linear in inputs):
        raise ValueError(f"{output.name} reads {count} channels, which is not what {inputs[0].name} makes")
    norms = norms_of(block, home, {count: torch.arange(count)[:, None]}, 1) if home else {}
    return part_of(block, kind, "channels", rows, output, torch.arange(count)[:, None], norms=norms)


def part_of(
    block: Block,
    kind: str,
    finest: str,
    rows: dict[str, Tensor],
    output: Linear,
    columns: Tensor,
    *,
    beside: dict[str, Tensor] | None = None,
    norms: dict[str, Tensor] | None = None,
    **further: Any,
) -> Part:
    """A part as units of the finest kind, or, where another is asked for, as one unit.

    beside, norms, further: of `Part`, for units of the finest kind; norms: their weights go with the units too
    """
    count, width = columns.shape
    parameters = output.shape[0] * width
    for name, each in rows.items():
        linear = block.linears[name]
        parameters += each.shape[1] * (linear.shape[1] + (_bias(linear) is not None))
    if kind == finest:
        tensors = dict(block.module.named_parameters()) | dict(block.module.named_buffers())
        beside = (beside or {}) | {f"{name}.weight": each for name, each in (norms or {}).items()}
        for name, each in beside.items():
            tensor = tensors[name.removeprefix(f"{block.name}.")]
            parameters += each.shape[1] * tensor[0].numel() * isinstance(tensor, nn.Parameter)
        for name, each in further.get("readers", {}).items():
            parameters += each.shape[1] * block.linears[name].shape[0]
        return Part(
            block.index,
            kind,
            count,
            parameters,
            rows,
            output.name,
            columns,
            beside=beside,
            norms=norms or {},
            **further,
        )
    whole = {name: each.reshape(1, -1) for name, each in rows.items()}
    home = output.name.removeprefix(f"{block.name}.").rpartition(".")[0]
    if home:  # all that is in its module goes with it
        parameters = sum(parameter.numel() for parameter in block.module.get_submodule(home).parameters())
    else:
        bias = _bias(output)
        parameters = parameters * count + (0 if bias is None else bias.numel())
    return Part(block.index, kind, 1, parameters, whole, output.name, columns.reshape(1, -1))


def norms_of(block: Block, home: str, wide: dict[int, Tensor], least: int) -> dict[str, Tensor]:
    """The norms in a module that read all units at once -> the entries (units, entries of each) of what they read.

    wide: entries by a norm's width; least: norms of that width, a head's, read one alone

    Raises:
        ValueError: a norm that takes the mean off, whose value for the units that are left needs the others.
    """
    found = {}
    for name, module in block.module.get_submodule(home).named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in name or weight is None or weight.numel() == least or weight.numel() not in wide:
            continue
        if weight.dim() != 1 or "rms" not in type(module).__name__.lower() or getattr(module, "bias", None) is not None:
            raise ValueError(f"{block.name}.{home}.{name} normalises all units together, so none can go alone")
        found[f"{block.name}.{home}.{name}"] = wide[weight.numel()]
    return found


def _bias(linear: Linear) -> Tensor | None:
    return getattr(linear.module, "bias", None)


def roles(block: Block, known: Roles, what: str) -> tuple[list[Linear], Linear, str]:
    """The linears that make the units, the one that reads them, and the module they are in. Raises NoPart."""
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
    held = {name.removeprefix(f"{block.name}.") for name in block.linears}
    mine = sorted(name for name in held if not any(name.startswith(f"{home}.") for home in block.experts))
    raise NoPart(
        f"{block.name} has no {what} whose linears sparsekit knows: it has {', '.join(mine) or 'experts alone'}; heads "
        "and channels can be removed from models built like LLaMA, DeepSeek, Qwen, Gemma, Phi, OPT, GPT-2 or GPT-NeoX"
    )


def ranges(count: int, width: int) -> Tensor:
    """Numbers from 0 on, (count, width)."""
    return torch.arange(count * width).view(count, width)
