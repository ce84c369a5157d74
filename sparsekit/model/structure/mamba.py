"""The channels of Mambas, and the heads of Mamba 2: which rows and columns are theirs, and how a mixer is told."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.structure.roles import NoPart, Roles, norms_of, part_of, ranges, roles
from sparsekit.model.structure.units import Part

MIXERS: Roles = ((("in_proj",), ("out_proj",)),)
WIDTHS = ("intermediate_size", "d_inner")  # what mixers call the number of their channels


def mamba_of(block: Block) -> Part:
    """The channels of a block's Mamba; of a Mamba 2 its heads, or, where groups of them share B and C, these groups.

    Raises:
        NoPart: there is none, or one that is built in another way.
        ValueError: one group of heads is left.
    """
    [linear], output, home = roles(block, MIXERS, "Mamba")
    mixer: Any = block.module.get_submodule(home)
    own = dict(mixer.named_parameters(recurse=False))
    if not {"A_log", "D"} <= set(own) or not isinstance(getattr(mixer, "conv1d", None), nn.Conv1d):
        raise NoPart(f"{block.name}.{home} has in_proj and out_proj, and is no Mamba that sparsekit knows")
    if own["A_log"].dim() == 2:
        return _channels(block, linear.name, output.name, home)
    return _heads(block, linear.name, output.name, home, mixer)


def count_mamba(mixer: Any, left: int, before: int) -> None:
    """Tell a Mamba how many channels it has now, and had before."""
    for name in WIDTHS:
        if hasattr(mixer, name):
            setattr(mixer, name, left)
    if not hasattr(mixer, "n_groups"):
        return
    groups = mixer.n_groups
    mixer.num_heads = mixer.num_heads * left // before
    if groups > 1:
        mixer.n_groups = groups * left // before
    mixer.conv_dim = left + 2 * mixer.n_groups * mixer.ssm_state_size
    for name in ("n_groups", "group_size"):  # of the gated norm
        if isinstance(value := getattr(getattr(mixer, "norm", None), name, None), int):
            whole = {"n_groups": mixer.n_groups, "group_size": left if value == before else value}
            setattr(mixer.norm, name, whole[name])


def _channels(block: Block, linear: str, output: str, home: str) -> Part:
    """Of the first Mamba: every channel has states of its own, and B, C and the time step are made of all of them."""
    count = block.linears[output].shape[1]
    reader, place = f"{block.name}.{home}.x_proj", f"{block.name}.{home}"
    if block.linears[linear].shape[0] != 2 * count or reader not in block.linears:
        raise NoPart(f"{place} does not make what is scanned, and its gate, of {count} channels each")
    each = torch.arange(count)[:, None]
    rows, beside = {linear: torch.cat([each, each + count], 1)}, _filters(block, home, each)
    beside |= {f"{place}.{name}": each for name in ("A_log", "D")}
    buffers = block.module.get_submodule(home).named_buffers()  # Falcon Mamba's ones, beside its time steps
    beside |= {f"{place}.{name}": each for name, buffer in buffers if buffer.shape == (count,)}
    if f"{place}.dt_proj" in block.linears:
        rows[f"{place}.dt_proj"] = each
    else:  # its weight is read, but it is not called
        beside |= _named(block, f"{home}.dt_proj", each)
    parts = {"beside": beside, "readers": {reader: each}}
    return part_of(block, "mamba", "mamba", rows, block.linears[output], each, **parts)


def _heads(block: Block, linear: str, output: str, home: str, mixer: Any) -> Part:
    """Of Mamba 2: in_proj makes the gate, what is scanned, B, C and the time steps, one after another."""
    width, place, groups = block.linears[output].shape[1], f"{block.name}.{home}", int(mixer.n_groups)
    heads, states, made = len(mixer.A_log), int(mixer.ssm_state_size), block.linears[linear].shape[0]
    if made != 2 * width + 2 * groups * states + heads or width % heads or heads % groups:
        raise NoPart(f"{place}.in_proj does not make gate, values, B, C and time steps of {heads} heads")
    count = heads if groups == 1 else groups
    values, steps = ranges(count, width // count), ranges(count, heads // count)
    both = ranges(2 * groups, states).split(groups) if groups > 1 else ()  # B and C of each group
    scanned = torch.cat([values, *(each + width for each in both)], 1)  # what the convolution reads
    rows = torch.cat([values, scanned + width, steps + 2 * width + 2 * groups * states], 1)
    beside = _filters(block, home, scanned) | {f"{place}.{name}": steps for name in ("A_log", "D", "dt_bias")}
    of_rows = [name for name, buffer in mixer.named_buffers(recurse=False) if buffer.shape[-1:] == (made,)]
    beside |= {f"{place}.{name}": rows for name in of_rows}  # Falcon-H1 multiplies what in_proj makes
    staying: dict[str, Tensor] = {}
    if groups == 1:
        tail = torch.arange(2 * states) + width  # B and C are for all heads
        staying = dict.fromkeys(_filters(block, home, scanned), tail)
        staying |= dict.fromkeys((linear, *(f"{place}.{name}" for name in of_rows)), tail + width)
    norm, norms = getattr(mixer, "norm", None), {}
    if getattr(norm, "weight", None) is not None:
        if _over_all(norm, width):
            norms = norms_of(block, home, {width: values}, 0)
        else:
            beside[f"{place}.norm.weight"] = values
    parts: dict[str, Any] = {"beside": beside, "norms": norms, "staying": staying, "fewest": 1 if groups == 1 else 2}
    return part_of(block, "mamba", "mamba", {linear: rows}, block.linears[output], values, **parts)


def _over_all(norm: Any, width: int) -> bool:
    """Whether a gated norm reads all channels at once, and not group by group."""
    return getattr(norm, "n_groups", 1) == 1 and getattr(norm, "group_size", width) == width


def _filters(block: Block, home: str, rows: Tensor) -> dict[str, Tensor]:
    return _named(block, f"{home}.conv1d", rows)


def _named(block: Block, module: str, rows: Tensor) -> dict[str, Tensor]:
    return {f"{block.name}.{module}.{name}": rows for name, _ in block.module.get_submodule(module).named_parameters()}
