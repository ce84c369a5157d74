"""Linears by what a recipe calls them: names and parts of names, ranges of blocks, kinds."""

import re

from sparsekit.model.blocks import Block, decides

KINDS = ("attention", "mlp", "experts", "router")
ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm")  # what mixes tokens; all else works on one at a time
BLOCKS = re.compile(r"blocks? (\d+)(?:-(\d+))?")


def kind_of(block: Block, name: str) -> str:
    """The kind of a block's linear: router, experts, attention (whatever mixes tokens, Mamba too), else mlp."""
    inner = name.removeprefix(f"{block.name}.")
    if decides(inner):
        return "router"
    if any(inner.startswith(f"{home}.") for home in block.experts):
        return "experts"
    return "attention" if ATTENTION.search(inner) else "mlp"


def meant(block: Block, name: str, target: str) -> bool:
    """Whether a target means a linear: `q_proj` or `self_attn.q_proj`, whole parts of its name; `blocks 0-3` or
    `block 7`, by number; or a kind, `attention`, `mlp`, `experts`, `router`."""
    if span := BLOCKS.fullmatch(target.strip()):
        return int(span[1]) <= block.index <= int(span[2] or span[1])
    if target in KINDS:
        return kind_of(block, name) == target
    return f".{target}." in f".{name}."
