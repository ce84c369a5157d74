"""A block and its linears: the repeated unit of a model."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from sparsekit.model.carried import Carried, Given, Known, moved
from sparsekit.model.experts import Experts
from sparsekit.model.linears import Linear, full_name, linears_of, rows


def put_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have a module run another function as its forward; what is given back puts there what was there before."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]

    return undo


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block's module is called with, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = "hidden_states" if "hidden_states" in kwargs else "hidden_state"  # Llama 4's vision tower
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


class _Stop(Exception):
    """Control flow, not an error: what was wanted has been seen; the rest of the forward pass is not needed."""


class Block:
    """One repeated unit of a model. A plain class: under bf16-true Lightning rebuilds dataclasses and loses updates.

    groups: names of the linears that read the same tensor, in call order (q,k,v | o | gate,up | down)
    calls: linears that run several times in a forward pass -> how often; each is a group of its own
    linears: name -> Linear
    experts: name inside the module -> a module of experts, whose linears are among these
    skipped: name -> why sparsekit leaves it as it is
    arguments: batch size -> (positional, keyword) arguments that follow the hidden states; carried: those of chunks
        that have others, and whatever else passes between blocks
    masks: name -> the weights (out, in) that were kept, once the block is pruned; zeros alone would not tell, since a
        kept weight may underflow in half precision
    records: name -> what was seen while it was pruned (error, seconds, zeros, warnings ...)
    fixed: the block cannot be dropped whole, since the family's config could not say so
    number: of the repeated blocks, counted from 0; None: it is a convolution outside of these (see `discover`)
    part: which of the model's lists of blocks it is of: 0, or 1 of a decoder behind an encoder
    channels: the dimension of its hidden states that is their width
    scale: how many times as large each dimension of its hidden states is behind it, but the first; none: as before it
    bridge: turns what leaves the block before into what enters this one, where something lies between the two
    trained: parameters of the module, by their names inside it, that gradient steps have changed
    notes: what a stage saw of the block as a whole (see the stage); JSON
    """

    def __init__(self, index: int, name: str, module: nn.Module, convolutions: Collection[str] = ()):
        """convolutions: names inside it of those that are to be linears, "" for the module itself"""
        self.index = index
        self.number: int | None = index
        self.name = name
        self.module = module
        self.convolutions = convolutions
        self.linears = self._linears(module)
        self.groups: list[list[str]] = []
        self.calls: dict[str, int] = {}
        self.experts = experts_of(module)
        self.skipped: dict[str, str] = {}
        self.masks: dict[str, Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.fixed = False
        self.part = 0
        self.channels = -1
        self.scale: tuple[Fraction, ...] = ()
        self.bridged = False  # something lies between the block before and this one
        self.bridge: Callable[[Tensor], Tensor] | None = None
        self.trained: set[str] = set()
        self.notes: dict[str, Any] = {}
        self.tuple_length = 0  # 0: the block returns a tensor; n: a tuple of n, hidden states first
        self.passes: tuple[int, ...] = ()  # places in it, but the first, that are tensors
        self.arguments: dict[int, Given] = {}
        self._there: Known = {}  # tensors among them, on the block's device
        self.carried = Carried()

    def to(self, device: torch.device | str, *_: Any, **__: Any) -> "Block":
        """Move the weights; Lightning calls this by itself."""
        self.module.to(device)
        self._there = {}
        if torch.device(device).type != "cpu":  # once, not for every chunk
            self._there = {
                id(each): (each, each.to(device))
                for each in tree_leaves([*self.arguments.values()])
                if isinstance(each, Tensor)
            }
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """The block's output hidden states, on the block's device, for (sequences, length, hidden)."""
        return self.with_parameters({}, hidden)

    def with_parameters(
        self, parameters: dict[str, Tensor], hidden: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The same with other tensors in place of the module's parameters (name inside it -> tensor), differentiable.

        dtype: what the hidden states, and the arguments that are of floating point, are cast to before.
        """
        chunk = hidden
        args, kwargs = self.carried.of(self.index, hidden, self.arguments[hidden.shape[0]])
        hidden, args = (moved(given, self.device, dtype, self._there) for given in (hidden, args))
        kwargs = {key: moved(given, self.device, dtype, self._there) for key, given in kwargs.items()}
        out = functional_call(self.module, parameters, (hidden, *args), kwargs)
        self.carried.take(self.index, chunk, out)
        return out[0] if isinstance(out, tuple | list) else out

    def enter(self, *stores: Any) -> None:
        """Turn what left the block before, chunk by chunk of these stores, into what enters this one."""
        if self.bridge is None:
            return
        for store in stores:
            for index in range(len(store)):
                store[index] = self.bridge(store[index])

    def scaled(self, hidden: Tensor) -> Tensor:
        """Zeros of the shape that the block makes of these hidden states, or they themselves where it is the same."""
        if not self.scale:
            return hidden
        return hidden.new_zeros(
            hidden.shape[0], *(int(n * by) for n, by in zip(hidden.shape[1:], self.scale, strict=True))
        )

    def expert_of(self, group: int) -> str | None:
        """The expert, by its name inside the block, whose linears a group is of; None: of none."""
        inner = self.groups[group][0].removeprefix(f"{self.name}.")
        for name in self.experts:
            if inner.startswith(f"{name}."):
                return f"{name}.{inner.removeprefix(f'{name}.').split('.')[0]}"
        return None

    def left(self, parameter: str) -> bool:
        """Whether a parameter, by its name inside the block, is of what sparsekit leaves as it is (`skipped`)."""
        name = f"{self.name}.{parameter}"
        return name in self.skipped or name.rpartition(".")[0] in self.skipped

    def keep_only(self, names: Collection[str]) -> None:
        """Let the block have these linears alone, in its groups too."""
        self.linears = {name: linear for name, linear in self.linears.items() if name in names}
        groups = ([name for name in group if name in names] for group in self.groups)
        self.groups = [group for group in groups if group]

    def twin(self) -> "Block":
        """A copy with its own weights; everything else is shared. Its experts are watched with this block's tokens."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        inner = self._linears(twin.module)
        twin.linears = {name: inner[name] for name in self.linears}
        twin.experts = experts_of(twin.module)
        for name, experts in twin.experts.items():
            experts.leader, experts.tokens = self.experts[name], self.experts[name].tokens
        return twin

    def _linears(self, module: nn.Module) -> dict[str, Linear]:
        named = ((full_name(self.name, inner), m) for inner, m in linears_of(module, self.convolutions))
        return {name: Linear(name, m) for name, m in named}

    def watch(self, watched: bool) -> None:
        """Tell the experts whether somebody looks at what enters their linears."""
        for experts in self.experts.values():
            experts.watched = watched

    @contextmanager
    def watching(
        self, groups: Iterable[int], see: Callable[[int, Tensor], None], *, routed: bool = False
    ) -> Iterator[None]:
        """While this lasts, `see(group, input)` is called when a forward pass reaches each of the groups.

        Of a linear that runs several times, once it has, with the inputs of all one after another.

        routed: what enters an expert is multiplied by what each row counts in its output (see `Experts.counted`)
        """
        hooks = []
        for group in groups:
            first = self.linears[self.groups[group][0]].module
            expert = self.expert_of(group) if routed else None
            experts = None if expert is None else self.experts[expert.rpartition(".")[0]]
            hook = partial(_shown, see, group, experts, self.calls.get(self.groups[group][0], 1), [])
            hooks.append(first.register_forward_pre_hook(hook))
        self.watch(True)
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self.watch(False)

    def until(
        self, hidden: Tensor, groups: list[int], see: Callable[[int, Tensor], None], *, routed: bool = False
    ) -> None:
        """Run only as far as the last of `groups`: what follows is not needed. Without groups nothing is run.

        routed: see `watching`
        """
        if not groups:
            return
        last = max(groups)

        def see_and_stop(group: int, inputs: Tensor) -> None:
            see(group, inputs)
            if group == last:
                raise _Stop

        with self.watching(groups, see_and_stop, routed=routed):
            try:
                self(hidden)
            except _Stop:
                return


def _shown(
    see: Callable[[int, Tensor], None],
    group: int,
    experts: Experts | None,
    calls: int,
    earlier: list[Tensor],
    linear: nn.Module,
    args: tuple[Any, ...],
) -> None:
    """What a hook does with what enters a group."""
    counted = None if experts is None else experts.counted
    inputs = rows(linear, args[0])
    inputs = inputs if counted is None else inputs * counted[:, None].to(inputs.dtype)
    if calls > 1:
        earlier.append(inputs)
        if len(earlier) < calls:
            return
        inputs = torch.cat(earlier, -2)
        earlier.clear()
    see(group, inputs)


# parts of names; gate_proj, half of a feed-forward part, is none
DECIDES = re.compile(r"(^|[._])router([.]|$)|(^|[.])(gate|gating)([.]|$)|(expert|output)_gate([.]|$)")


def decides(name: str) -> bool:
    """Whether a linear, by its name inside the block, decides instead of computing: routers and gates of experts."""
    return DECIDES.search(name) is not None


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """The modules of experts inside a module, by name, in order of definition."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Experts)}
