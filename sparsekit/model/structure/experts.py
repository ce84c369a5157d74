"""How a family says how many experts a block has, and what has a place for each: seen by building it with fewer."""

import re
from collections.abc import Callable, Mapping, Sequence
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

    rows: parameters and buffers outside the experts with a row for each of them, by name: the router's, score biases;
        -> the dimension that has them, and how many more are behind them, of experts that all tokens go through
    numbers: (name of a module, attribute) that hold the count; outside: those that are in no block
    """

    field: str
    least: int
    rows: Mapping[str, tuple[int, int]]
    numbers: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...] = ()

    def of(self, block: Block) -> "ExpertCount":
        """What of it lies in a block, by the names inside it."""
        start = f"{block.name}."
        rows = {name.removeprefix(start): each for name, each in self.rows.items() if name.startswith(start)}
        numbers = tuple((name.removeprefix(start), key) for name, key in self.numbers if name.startswith(start))
        return replace(self, rows=rows, numbers=numbers)


def count_experts(model: Any, blocks: Sequence[Block]) -> ExpertCount:
    """Compare the model with one of its family that has fewer experts, or one more; both on the meta device.

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
    return [other for other in (number // 2, number - 1) if least <= other < number] or [number + 1]


def _compared(model: nn.Module, built: nn.Module, field: str, least: int, number: int, other: int) -> ExpertCount:
    rows: dict[str, tuple[int, int]] = {}
    numbers: list[tuple[str, str]] = []
    with joined(model), joined(built):
        fused = tuple(f"{name}." for name, module in model.named_modules() if _holds_experts(module))
        one, two = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, built))
        for name in one.keys() & two.keys():
            before, after = tuple(one[name].shape), tuple(two[name].shape)
            if before == after or name.startswith(fused):
                continue
            dims = [dim for dim, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
            more = before[dims[0]] - number if len(dims) == 1 and len(before) == len(after) else -1
            router = model.get_submodule(name.rpartition(".")[0])
            if more < 0 or after[dims[0]] != other + more or (more and hasattr(router, "config")):  # which it may ask
                raise ValueError(f"{name} is {before}, and would be {after} with {other} experts: none can be removed")
            rows[name] = dims[0], more
        modules = dict(built.named_modules())
        mores = {0, *(more for _, more in rows.values())}
        for name, module in model.named_modules():
            theirs = vars(modules[name])
            numbers += [
                (name, key)
                for key, value in vars(module).items()
                if type(value) is int and any((value, theirs.get(key)) == (number + n, other + n) for n in mores)
            ]
    home = find_blocks(model)[0].name.rpartition(".")[0]
    outside = tuple(each for each in numbers if not each[0].startswith(f"{home}."))
    return ExpertCount(field, least, dict(sorted(rows.items())), tuple(numbers), outside)


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
    for name, (dim, more) in count.rows.items():
        undo.append(_swapped(block.module, name, dim, with_more(places, len(kept), more)))
    for name, key in count.numbers:
        module = block.module.get_submodule(name)
        owner: Any = module.fused if isinstance(module, Experts) else module
        undo.append(_set(owner, key, getattr(owner, key) - len(kept) + len(places)))
    before = experts.kept
    experts.kept = places.tolist()
    undo.append(lambda: setattr(experts, "kept", before))

    def back() -> None:
        for each in reversed(undo):
            each()

    return back


def with_more(places: Tensor, count: int, more: int) -> Tensor:
    """These places of experts out of `count`, and the `more` behind all of them."""
    return torch.cat([places, torch.arange(count, count + more, device=places.device)])


def _swapped(module: nn.Module, name: str, dim: int, places: Tensor) -> Callable[[], None]:
    inner, _, last = name.rpartition(".")
    owner = module.get_submodule(inner)
    home: Any = owner._parameters if last in owner._parameters else owner._buffers
    whole = home[last]
    rows = whole.detach().index_select(dim, places.to(whole.device))
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
