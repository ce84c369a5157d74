"""Linears by what a recipe calls them: names and parts of names, ranges of blocks, kinds."""

import re
from collections.abc import Collection

from torch import nn

from sparsekit.model.blocks import Block, decides
from sparsekit.model.linears import CONVOLUTIONS, is_convolution

KINDS = ("attention", "mlp", "experts", "router", "convolution")
ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm")  # what mixes tokens; all else works on one at a time
BLOCKS = re.compile(r"blocks? (\d+)(?:-(\d+))?")


def kind_of(block: Block, name: str) -> str:
    """The kind of a block's linear: convolution, router, experts, attention (whatever mixes tokens, Mamba too), mlp."""
    if isinstance(block.linears[name].module, CONVOLUTIONS):
        return "convolution"
    inner = name.removeprefix(f"{block.name}.")
    if decides(inner):
        return "router"
    if any(inner.startswith(f"{home}.") for home in block.experts):
        return "experts"
    return "attention" if ATTENTION.search(inner) else "mlp"


def meant(block: Block, name: str, target: str) -> bool:
    """Whether a target means a linear: `q_proj` or `self_attn.q_proj`, whole parts of its name; `blocks 0-3` or
    `block 7`, by number; or a kind, one of `KINDS`."""
    if span := BLOCKS.fullmatch(target.strip()):
        return block.number is not None and int(span[1]) <= block.number <= int(span[2] or span[1])
    if target in KINDS:
        return kind_of(block, name) == target
    return f".{target}." in f".{name}."


def named_convolutions(model: nn.Module, targets: Collection[str]) -> list[str]:
    """The convolutions that are linears over patches and that targets name: see `names_convolution`."""
    return [
        name
        for name, module in model.named_modules()
        if is_convolution(module) and any(names_convolution(name, target) for target in targets)
    ]


def names_convolution(name: str, target: str) -> bool:
    """Whether a target names a convolution of this name: all by the kind `convolution`, else by how the name ends.

    What names a part of the model, or a range of blocks, means the linears in it alone.
    """
    return target == "convolution" or f".{name}".endswith(f".{target}")


def names_convolutions(model: nn.Module, target: str) -> bool:
    """Whether a target names any convolution of a model, of whatever form."""
    return any(names_convolution(name, target) for name, m in model.named_modules() if isinstance(m, CONVOLUTIONS))
