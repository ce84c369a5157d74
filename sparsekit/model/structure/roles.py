"""What the linears of a block do, by the last part of their names; the channels of MLPs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.model.blocks import Block, Linear, linears_of
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
    for name, norm in block.module.get_submodule(home).named_parameters() if home else ():
        if "norm" in name and norm.numel() == count:
            raise ValueError(f"{block.name}.{home}.{name} normalises all channels together, so none can go alone")
    rows = {linear.name: torch.arange(count)[:, None] for linear in inputs}
    [*others, last] = inputs
    if not others and last.shape[0] == 2 * count:
        rows = {last.name: torch.stack([torch.arange(count), torch.arange(count) + count], 1)}
    elif any(linear.shape[0] != count for linear in inputs):
        raise ValueError(f"{output.name} reads {count} channels, which is not what {inputs[0].name} makes")
    return part_of(block, kind, "channels", rows, output, torch.arange(count)[:, None])


def part_of(
    block: Block,
    kind: str,
    finest: str,
    rows: dict[str, Tensor],
    output: Linear,
    columns: Tensor,
) -> Part:
    """A part as units of the finest kind, or, where another is asked for, as one unit."""
    count, width = columns.shape
    parameters = output.shape[0] * width
    for name, each in rows.items():
        linear = block.linears[name]
        parameters += each.shape[1] * (linear.shape[1] + (_bias(linear) is not None))
    if kind == finest:
        return Part(block.index, kind, count, parameters, rows, output.name, columns)
    whole = {name: each.reshape(1, -1) for name, each in rows.items()}
    home = output.name.removeprefix(f"{block.name}.").rpartition(".")[0]
    if home:  # all that is in its module goes with it
        parameters = sum(parameter.numel() for parameter in block.module.get_submodule(home).parameters())
    else:
        bias = _bias(output)
        parameters = parameters * count + (0 if bias is None else bias.numel())
    return Part(block.index, kind, 1, parameters, whole, output.name, columns.reshape(1, -1))


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
