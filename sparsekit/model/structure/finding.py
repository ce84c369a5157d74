"""Finding what can be removed from a model, by what the linears of its blocks do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsekit.model.blocks import Block
from sparsekit.model.structure.experts import ExpertCount, count_experts
from sparsekit.model.structure.heads import heads_of
from sparsekit.model.structure.layers import stretches
from sparsekit.model.structure.mamba import mamba_of
from sparsekit.model.structure.nothing import Nothing
from sparsekit.model.structure.roles import NoPart, channels_of
from sparsekit.model.structure.units import KINDS, Part, Units, check_kinds


def find_units(model: nn.Module, blocks: Sequence[Block], kinds: Sequence[str] = ("heads", "channels")) -> Units:
    """The units of these kinds in a model's blocks, of parts that are still there. Works on the meta device.

    Raises:
        ValueError: kinds that are unknown or cannot be removed together, or a block whose linears have other roles
            than are known (`roles`, `heads`); or layers that know their number.
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
                columns = torch.empty(1, 0, dtype=torch.long)
                own = stretches(model, block)
                parts.append(Part(block.index, kind, 1, parameters, {}, None, columns, outside=own))
            elif not _gone(block, attention=kind in ("heads", "attention")):
                try:
                    parts.append(_part(model, block, kind))
                except NoPart as reason:  # a mixture of experts, a Mamba block: others may have them
                    lacking.setdefault(kind, reason)
    if "layers" in kinds and not parts:
        raise ValueError(f"no layer of {type(model).__name__} can be dropped: its config could not say that it is gone")
    for kind, first in lacking.items():
        if not any(part.kind == kind for part in parts):
            there = next((part.kind for part in parts), "")
            raise NoPart(f"{first}; its {there} can go alone: give `units: {there}`" if there else str(first))
    return Units(tuple(parts), sum(p.numel() for block in blocks for p in block.module.parameters()))


def _part(model: nn.Module, block: Block, kind: str) -> Part:
    if kind == "mamba":
        return mamba_of(block)
    return heads_of(model, block, kind) if kind in ("heads", "attention") else channels_of(block, kind)


def _experts(block: Block, home: str, counted: ExpertCount) -> Part:
    mine, experts = counted.of(block), block.experts[home]
    tensors = dict(block.module.named_parameters()) | dict(block.module.named_buffers())
    rows = sum(
        tensors[name].select(dim, 0).numel()
        for name, (dim, _) in mine.rows.items()
        if isinstance(tensors[name], nn.Parameter)
    )
    each = sum(p.numel() for p in experts.get_submodule("0").parameters()) + rows
    columns = torch.empty(experts.count, 0, dtype=torch.long)
    place = f"{block.name}.{home}"
    return Part(block.index, "experts", experts.count, each, {}, None, columns, home=place, experts=mine)


def _gone(block: Block, attention: bool) -> bool:
    """Whether the attention, or the MLP, was removed before."""
    left = [module for module in block.module.modules() if isinstance(module, Nothing)]
    return any((module.layer_idx is not None) == attention for module in left)
