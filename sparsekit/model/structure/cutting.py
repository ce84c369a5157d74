"""Taking units out of a model in memory: fewer rows, columns and layers, equal logits to the masked model's."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.linears import Linear
from sparsekit.model.structure.experts import remove_experts
from sparsekit.model.structure.heads import BY_QUERY, count_heads, head_size
from sparsekit.model.structure.layers import drop_layers
from sparsekit.model.structure.mamba import count_mamba
from sparsekit.model.structure.nothing import Nothing
from sparsekit.model.structure.units import Part, Units


@torch.no_grad()
def cut(model: nn.Module, blocks: Sequence[Block], units: Units, kept: Tensor) -> None:
    """Remove the units where `kept` (units,) is false, in place. Works on the meta device.

    A part that loses all its units is gone with its biases. Layers that remain are numbered anew, and so are the caches
    of keys and values. `blocks` are of the model as it was: look for them again.
    """
    by_index = {block.index: block for block in blocks}
    for part, each in zip(units.parts, units.split(kept.bool()), strict=True):
        if part.kind == "heads":
            setattr(model, BY_QUERY, part.one_key)
        if part.experts is not None and not bool(each.all()):
            block = by_index[part.block]
            remove_experts(block, part.home.removeprefix(f"{block.name}."), part.experts, each)
            for name, key in part.experts.outside:
                setattr(model.get_submodule(name), key, int(each.sum()))
        elif part.kind != "layers" and not bool(each.all()):
            _narrow(by_index[part.block], part, each)
    pairs = zip(units.parts, units.split(kept), strict=True)
    gone = [part for part, each in pairs if part.kind == "layers" and not each]
    if gone:
        drop_layers(model, blocks, {part.block for part in gone}, [part.outside for part in gone])


def _narrow(block: Block, part: Part, kept: Tensor) -> None:
    assert part.output is not None
    attention = part.kind in ("heads", "attention")
    output = block.linears[part.output]
    home = part.output.removeprefix(f"{block.name}.").rpartition(".")[0]
    if not bool(kept.any()):
        _remove(block, part, home, attention)
        return
    columns = part.columns[kept].flatten()
    width = output.shape[1]
    size = head_size(block.module.get_submodule(home), width) if attention else None
    for name in part.inputs:
        _keep(block.linears[name], rows=part.rows_left(name, kept))
    for name in part.beside:
        module, _, last = name.removeprefix(f"{block.name}.").rpartition(".")
        _keep_beside(block.module.get_submodule(module), last, part.rows_left(name, kept))
    for name, each in part.readers.items():
        _keep(block.linears[name], columns=each[kept].flatten())
    _keep(output, columns=columns)
    if size is not None:
        count_heads(block.module.get_submodule(home), len(columns) // size, size, width, part.one_key)
    if part.kind == "mamba":
        count_mamba(block.module.get_submodule(home), len(columns), width)


def _remove(block: Block, part: Part, home: str, attention: bool) -> None:
    """Put `Nothing` in the place of a whole part."""
    if home:
        module = block.module.get_submodule(home)
        index = getattr(module, "layer_idx", block.index) if attention else None
        taken = list(inspect.signature(type(module).forward).parameters)
        residual = taken.index("residual") - 2 if "residual" in taken else None
        _replace(block.module, home, Nothing(index, residual))  # type: ignore[arg-type]
        return
    for name in part.inputs:  # OPT has no module around its MLP
        _replace(block.module, name.removeprefix(f"{block.name}."), nn.Identity())
    _replace(block.module, str(part.output).removeprefix(f"{block.name}."), Nothing())


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, by)


def _keep(linear: Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Only these rows, or columns, of a linear (out, in)."""
    module: Any = linear.module
    weight = linear.weight
    bias = getattr(module, "bias", None)
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        if bias is not None:
            module.bias = nn.Parameter(bias.detach()[rows.to(bias.device)], bias.requires_grad)
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    module.weight = nn.Parameter(linear.stored(weight).clone(), module.weight.requires_grad)
    out, width = weight.shape
    if linear.transposed:
        module.nf, module.nx = out, width
    else:
        module.out_features, module.in_features = out, width


def _keep_beside(module: Any, name: str, rows: Tensor) -> None:
    """Only these rows of a parameter that is no linear's, or these places of a buffer's last dimension."""
    tensor = getattr(module, name)
    if not isinstance(tensor, nn.Parameter):
        setattr(module, name, tensor[..., rows.to(tensor.device)])
        return
    setattr(module, name, nn.Parameter(tensor.detach()[rows.to(tensor.device)], tensor.requires_grad))
    if name == "weight" and isinstance(module, nn.Conv1d):  # one filter for each channel
        module.in_channels = module.out_channels = module.groups = len(rows)
    elif name == "weight" and isinstance(module, nn.Linear):
        module.out_features = len(rows)
