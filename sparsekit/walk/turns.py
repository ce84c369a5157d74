"""Statistics of more experts than fit into memory at once: some of them in each turn."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.model import Block, Experts
from sparsekit.system import ActivationStore


def in_turns(block: Block, room: int) -> list[list[int]]:
    """The groups of a block in turns, each of as many experts as have `room` bytes for the Gram matrices of all.

    The first turn has all groups that are not of experts. Groups of one expert come in one turn, since what enters the
    last depends on the weights of those before.
    """
    sizes = [4 * block.linears[names[0]].shape[1] ** 2 for names in block.groups]
    found: list[list[int]] = [[index for index in range(len(sizes)) if block.expert_of(index) is None]]
    used = sum(sizes[index] for index in found[0])
    by_expert: dict[str, list[int]] = {}
    for index in range(len(sizes)):
        if (expert := block.expert_of(index)) is not None:
            by_expert.setdefault(expert, []).append(index)
    for groups in by_expert.values():
        size = sum(sizes[index] for index in groups)
        if found[-1] and used + size > room:
            found.append([])
            used = 0
        found[-1] += groups
        used += size
    return [sorted(groups) for groups in found]


class Given:
    """What modules of experts are given in a pass over all chunks, to be given to them again.

    budget, folder: see `ActivationStore`
    """

    def __init__(self, experts: Mapping[str, Experts], budget: int, folder: Path | str | None):
        self.experts = list(experts.values())
        self.stores = [ActivationStore(budget // max(1, len(self.experts)), folder) for _ in self.experts]
        self.rest: list[list[tuple[Any, ...]]] = [[] for _ in self.experts]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, all is kept."""

        def keep(place: int, args: tuple[Any, ...]) -> None:
            self.stores[place].append(args[0])
            self.rest[place].append(tuple(each.cpu() if isinstance(each, Tensor) else each for each in args[1:]))

        hooks = [
            module.register_forward_pre_hook(lambda _, args, place=place: keep(place, args))
            for place, module in enumerate(self.experts)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def again(self, device: Any) -> None:
        """Run the experts on it."""
        for module, store, rest in zip(self.experts, self.stores, self.rest, strict=True):
            for hidden, others in zip(store, rest, strict=True):
                module(hidden.to(device), *(each.to(device) if isinstance(each, Tensor) else each for each in others))

    def close(self) -> None:
        """Forget it."""
        for store in self.stores:
            store.close()
