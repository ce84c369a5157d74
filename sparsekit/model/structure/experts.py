"""How a family says how many experts a block has, and what has a place for each: seen by building it with fewer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model import rebuild
from sparsekit.model.blocks import Block
from sparsekit.model.discovery import find_blocks
from sparsekit.model.expert_forms import joined
from sparsekit.model.experts import Experts

COUNT = re.compile(r"experts$|experts_num$|num_experts|num_local_experts")  # fields of configs
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertCount:
    """field: of the config, the number of experts; least: experts that each token is sent to

    rows: parameters and buffers outside the experts with a row for each of them, by name: the router's, score biases
    numbers: (name of a module, attribute) that hold the count; outside: those that are in no block
    """

    field: str
    least: int
    rows: tuple[str, ...]
    numbers: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...] = ()

    def of(self, block: Block) -> "ExpertCount":
        """What of it lies in a block, by the names inside it."""
        start = f"{block.name}."
        rows = tuple(name.removeprefix(start) for name in self.rows if name.startswith(start))
        numbers = tuple((name.removeprefix(start), key) for name, key in self.numbers if name.startswith(start))
        return replace(self, rows=rows, numbers=numbers)


def count_experts(model: Any, blocks: Sequence[Block]) -> ExpertCount:
    """Compare the model with one of its family that has fewer experts; both on the meta device.

    Raises:
        ValueError: it has no experts, or none that can be removed: the sentence says why.
    """
    counts = {experts.count for block in blocks for experts in block.experts.values()}
    name = type(model).__name__
    if not counts:
        raise ValueError(f"{name} has no experts that sparsekit knows; choose other units")
    if len(counts) > 1 or any(len(block.experts) > 1 for block in blocks):
        raise ValueError(f"the blocks of {name} have several lists of experts, or not equally many; choose other units")
    config = rebuild.config_of(model)
    text = config.get("text_config", config)
    [number] = counts
    least = next((int(text[key]) for key in ROUTED if isinstance(text.get(key), int)), 1)
    if (text.get("n_group") or 1) > 1:
        raise ValueError(f"{name} sends tokens to groups of experts (n_group), so none can be removed alone")
    fields = [key for key in text if COUNT.search(key) and isinstance(text[key], int) and text[key] >= number]
    for field, other in ((field, other) for field in fields for other in _others(number, least)):
        changed = text | {field: other}
        try:
            built = rebuild.build(config | {"text_config": changed} if "text_config" in config else changed, "meta")
        except ValueError:
            continue
        if {module.count for module in built.modules() if isinstance(module, Experts)} == {other}:
            return _compared(model, built, field, least, number, other)
    raise ValueError(f"no field of the config of {name} says how many experts it has, so none can be removed")


def _others(number: int, least: int) -> list[int]:
    return [other for other in (number // 2, number - 1) if least <= other < number]


def _compared(model: nn.Module, built: nn.Module, field: str, least: int, number: int, other: int) -> ExpertCount:
    rows, numbers = [], []
    with joined(model), joined(built):
        fused = tuple(f"{name}." for name, module in model.named_modules() if _holds_experts(module))
        one, two = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, built))
        for name in one.keys() & two.keys():
            before, after = tuple(one[name].shape), tuple(two[name].shape)
            if before == after or name.startswith(fused):
                continue
            if before[1:] != after[1:] or (before[0], after[0]) != (number, other):
                raise ValueError(f"{name} is {before}, and would be {after} with {other} experts: none can be removed")
            rows.append(name)
        modules = dict(built.named_modules())
        for name, module in model.named_modules():
            theirs = vars(modules[name])
            numbers += [
                (name, key)
                for key, value in vars(module).items()
                if type(value) is int and value == number and theirs.get(key) == other
            ]
    home = find_blocks(model)[0].name.rpartition(".")[0]
    outside = tuple(each for each in numbers if not each[0].startswith(f"{home}."))
    return ExpertCount(field, least, tuple(sorted(rows)), tuple(numbers), outside)


def _holds_experts(module: nn.Module) -> bool:
    return any(isinstance(parameter, Tensor) and parameter.dim() == 3 for parameter in module._parameters.values())


def with_fewer(block: Block, home: str, count: ExpertCount, kept: Tensor) -> Callable[[], None]:
    """Have a block route to the experts alone that are kept (experts,); what is given back undoes it.

    The router is that of the smaller model, and the experts keep their numbers inside: nothing of them is copied. Where
    fewer are kept than each token is sent to, the first of the others stay too.
    """
    kept = kept.clone()
    missing = count.least - int(kept.sum())
    if missing > 0:
        kept[(~kept).nonzero().flatten()[:missing]] = True
    places = kept.nonzero().flatten()
    experts: Any = block.module.get_submodule(home)
    undo: list[Callable[[], Any]] = []
    for name in count.rows:
        undo.append(_swapped(block.module, name, places))
    for name, key in count.numbers:
        module = block.module.get_submodule(name)
        owner: Any = module.fused if isinstance(module, Experts) else module
        undo.append(_set(owner, key, len(places)))
    before = experts.kept
    experts.kept = places.tolist()
    undo.append(lambda: setattr(experts, "kept", before))

    def back() -> None:
        for each in reversed(undo):
            each()

    return back


def _swapped(module: nn.Module, name: str, places: Tensor) -> Callable[[], None]:
    inner, _, last = name.rpartition(".")
    owner = module.get_submodule(inner)
    home: Any = owner._parameters if last in owner._parameters else owner._buffers
    whole = home[last]
    rows = whole.detach()[places.to(whole.device)]
    home[last] = nn.Parameter(rows, whole.requires_grad) if isinstance(whole, nn.Parameter) else rows
    return lambda: home.__setitem__(last, whole)


def _set(owner: Any, key: str, value: int) -> Callable[[], None]:
    before = getattr(owner, key)
    setattr(owner, key, value)
    return lambda: setattr(owner, key, before)


@torch.no_grad()
def remove_experts(block: Block, home: str, count: ExpertCount, kept: Tensor) -> None:
    """The same for good: the experts that go are no longer there."""
    with_fewer(block, home, count, kept)
    experts: Any = block.module.get_submodule(home)
    fused, places = experts.fused, torch.tensor(experts.kept)
    for whole in dict.fromkeys(piece.whole for piece in experts.pieces):
        parameter = getattr(fused, whole)
        rows = parameter.detach()[places.to(parameter.device)].clone()
        setattr(fused, whole, nn.Parameter(rows, parameter.requires_grad))
    block.module.set_submodule(home, type(experts)(fused))
