"""Blocks whose parameters are divided among processes while they are trained: torch's FSDP, on twins of the blocks."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsekit.model import Block
from sparsekit.system import Team


class Sharding:
    """While a model is trained it runs with twins of its blocks, of which each process holds a share of every tensor.

    A twin is built of the block's own parameters, which FSDP leaves as they are; so the blocks themselves, and all that
    knows them, stay whole in the host's memory, and have what was learned when the training ends.

    leaves: name in the model -> what is trained, all of it inside the blocks; the same mapping has the shares after
        `divide`, and the blocks' own parameters again after `join`
    masks: leaf's name -> what is kept of it, in its shape; the gradients of all else are zero

    Raises:
        ValueError: blocks with experts, whose linears are views of one parameter, or a leaf outside the blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        leaves: dict[str, nn.Parameter],
        team: Team,
        masks: Mapping[str, Tensor] | None = None,
    ):
        self.model, self.blocks, self.leaves, self.team, self.masks = model, blocks, leaves, team, dict(masks or {})
        self.own: dict[str, nn.Parameter] = {}  # what is trained, whole, while there are twins
        inside = tuple(f"{block.name}." for block in blocks)
        if outside := [name for name in leaves if not name.startswith(inside)]:
            raise ValueError(
                f"strategy fsdp divides blocks, and {min(outside)} is outside them; train the blocks alone"
            )
        check_divisible(blocks)

    def divide(self, mesh: Any) -> None:
        """Put the twins in the blocks' places. mesh: of the processes, one dimension"""
        from torch.distributed.fsdp import fully_shard

        if self.own:
            return
        self.own = dict(self.leaves)
        for block in self.blocks:
            twin = _twin(block.module)
            fully_shard(twin, mesh=mesh, reshard_after_forward=True)
            self._place(block, twin)
        for name in self.leaves:
            self.leaves[name] = self.model.get_parameter(name)
        self.masks = {name: self._mine(kept) for name, kept in self.masks.items()}

    @torch.no_grad()
    def join(self) -> None:
        """Give the blocks what was learned, and the model its blocks."""
        for name, whole in self.own.items():
            shared: Any = self.leaves[name]
            whole.copy_(shared.full_tensor())  # one at a time: all processes give their shares
            whole.grad = None
            self.leaves[name] = whole
        for block in self.blocks if self.own else ():
            self._place(block, block.module)
        self.own = {}

    @torch.no_grad()
    def mean_gradients(self, weight: float) -> None:
        """Of what FSDP made, the means of the processes' sums, that of all things; see `step.mean_gradients`."""
        total = torch.tensor([weight], dtype=torch.float64)
        self.team.sum([total])
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                mine = local(leaf.grad)
                mine *= self.team.size / max(float(total), 1)
                if name in self.masks:
                    self.masks[name] = self.masks[name].to(mine.device)
                    mine *= self.masks[name]

    def _place(self, block: Block, module: nn.Module) -> None:
        home, _, last = block.name.rpartition(".")
        setattr(self.model.get_submodule(home), last, module)

    def _mine(self, kept: Tensor) -> Tensor:
        """The rows of a mask that this process has: as many in every process, as far as they go."""
        parts = kept.chunk(self.team.size)
        return (parts[self.team.rank] if self.team.rank < len(parts) else kept[:0]).clone()


def check_divisible(blocks: Sequence[Block]) -> None:
    """Raise ValueError for blocks with experts, whose linears are views of one parameter."""
    if experts := next((block for block in blocks if block.experts), None):
        raise ValueError(
            f"strategy fsdp cannot divide {experts.name}, whose experts lie in one parameter; give strategy: ddp"
        )


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is divided; any other as it is."""
    mine: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same tensors."""
    held = [*module.parameters(), *module.buffers()]
    for inner in module.modules():
        held += [value for value in vars(inner).values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in held})
