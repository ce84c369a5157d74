"""The repeated blocks of a model: found, not configured, for any transformer that calls them one after another."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.images import sees_images


class Linear:
    """One linear of a block. Its weight is (out, in) whatever the layer stores: the one place that knows Conv1D."""

    def __init__(self, name: str, module: nn.Module):
        self.name = name  # of the module inside the model; the parameter is name + ".weight"
        self.module = module
        self.transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores (in, out)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), a view of the parameter."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator,assignment]
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return tuple(self.weight.shape)  # type: ignore[return-value]

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set the weight (out, in), cast to the parameter's dtype, bit for bit."""
        self.weight.copy_(weight)

    @torch.no_grad()
    def write_pruned(self, weight: Tensor) -> None:
        """The same for a solver's answer: -0.0 becomes 0.0."""
        self.weight.copy_(weight).add_(0.0)

    def stored(self, weight: Tensor) -> Tensor:
        """A tensor (out, in) laid out as a checkpoint stores it, and back."""
        return weight.t().contiguous() if self.transposed else weight.contiguous()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be pruned: nn.Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _Stop(Exception):
    """Control flow, not an error: what was wanted has been seen; the rest of the forward pass is not needed."""


class Block:
    """One repeated unit of a model. A plain class: under bf16-true Lightning rebuilds dataclasses and loses updates.

    groups: names of the linears that read the same tensor, in call order (q,k,v | o | gate,up | down)
    linears: name -> Linear
    skipped: name -> why sparsekit leaves it as it is
    arguments: batch size -> (positional, keyword) arguments that follow the hidden states
    masks: name -> the weights (out, in) that were kept, once the block is pruned; zeros alone would not tell, since a
        kept weight may underflow in half precision
    records: name -> what was seen while it was pruned (error, seconds, zeros, warnings ...)
    trained: parameters of the module, by their names inside it, that gradient steps have changed
    notes: what a stage saw of the block as a whole (see the stage); JSON
    """

    def __init__(self, index: int, name: str, module: nn.Module):
        self.index = index
        self.name = name
        self.module = module
        self.linears = {f"{name}.{inner}": Linear(f"{name}.{inner}", m) for inner, m in linears_of(module)}
        self.groups: list[list[str]] = []
        self.skipped: dict[str, str] = {}
        self.masks: dict[str, Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.trained: set[str] = set()
        self.notes: dict[str, Any] = {}
        self.tuple_length = 0  # 0: the block returns a tensor; n: a tuple of n, hidden states first
        self.arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def to(self, device: torch.device | str, *_: Any, **__: Any) -> "Block":
        """Move the weights; Lightning calls this by itself."""
        self.module.to(device)
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
        args, kwargs = self.arguments[hidden.shape[0]]
        hidden, args, kwargs = (_to(given, self.device, dtype) for given in (hidden, args, kwargs))
        out = functional_call(self.module, parameters, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def twin(self) -> "Block":
        """A copy with its own weights; everything else is shared."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        twin.linears = {name: Linear(name, m) for name, m in zip(self.linears, _modules(twin.module), strict=True)}
        return twin

    @contextmanager
    def watching(self, groups: Iterable[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
        """While this lasts, `see(group, input)` is called when a forward pass reaches each of the groups."""
        hooks = []
        for group in groups:
            first = self.linears[self.groups[group][0]].module

            def hook(_: nn.Module, args: tuple[Any, ...], group: int = group) -> None:
                see(group, args[0])

            hooks.append(first.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def until(self, hidden: Tensor, groups: list[int], see: Callable[[int, Tensor], None]) -> None:
        """Run only as far as the last of `groups`: what follows is not needed."""
        last = max(groups)

        def see_and_stop(group: int, inputs: Tensor) -> None:
            see(group, inputs)
            if group == last:
                raise _Stop

        with self.watching(groups, see_and_stop):
            try:
                self(hidden)
            except _Stop:
                return


def linears_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every linear inside a module, in order of definition."""
    return [(name, m) for name, m in module.named_modules() if is_linear(m)]


def _modules(module: nn.Module) -> list[nn.Module]:
    return [m for _, m in linears_of(module)]


def _to(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The tensors of a structure on a device, and those of floating point in `dtype` if it is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if hasattr(value, "_fields"):  # a namedtuple
        return type(value)(*(_to(item, device, dtype) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device, dtype) for key, item in value.items()}
    return value


def _run(model: Any, given: Tensor, *, use_cache: bool) -> None:
    if not sees_images(model):
        model(input_ids=given, use_cache=use_cache)
        return
    encode = getattr(model, "get_image_embeddings", model)  # what follows SAM's image encoder asks for points
    encode(pixel_values=given.to(model.dtype))


def find(model: nn.Module) -> list[Block]:
    """The model's blocks: the list of modules that holds the most weight in linears.

    Raises:
        ValueError: the model has no list of blocks with linears.
    """

    def weight(layers: nn.ModuleList) -> int:
        return sum(Linear("", m).weight.numel() for layer in layers for m in _modules(layer))

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: weight(item[1]), default=("", nn.ModuleList()))
    if not weight(layers):
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks: sparsekit needs a list of modules (nn.ModuleList) that "
            "hold linears, as every transformer in the transformers library has"
        )
    return [Block(index, f"{name}.{index}", layer) for index, layer in enumerate(layers)]


@torch.no_grad()
def discover(model: nn.Module, tokens: Tensor) -> list[Block]:
    """The model's blocks with their groups, seen in one forward pass of `tokens` (sequences, length), best a few.

    A vision model's are pixels (images, channels, height, width), here and in `first_inputs`. Works on the meta device
    too. Linears that the pass does not reach are left as they are and named in `skipped`, and so are fused experts
    (parameters with three dimensions): each expert sees only some tokens.

    Raises:
        ValueError: no blocks, a block runs more than once in a forward pass, or gives hidden states of another shape.
    """
    blocks = find(model)
    keep: list[Tensor] = []  # inputs stay alive, so that no two of them share an address
    hooks = []
    runs = dict.fromkeys((block.index for block in blocks), 0)

    def ran(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        runs[block.index] += 1
        block.tuple_length = len(out) if isinstance(out, tuple) else 0
        before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        if before.shape != after.shape:
            raise ValueError(
                f"{block.name} turns hidden states {tuple(before.shape)} into {tuple(after.shape)}: models of several "
                "stages (Swin) cannot be pruned block by block"
            )

    def reached(block: Block, name: str, seen: dict[Any, list[str]], inputs: Tensor) -> None:
        keep.append(inputs)
        key = (inputs.untyped_storage()._cdata, inputs.storage_offset(), inputs._version, inputs.shape[-1])
        if key not in seen:
            seen[key] = []
            block.groups.append(seen[key])
        seen[key].append(name)

    for block in blocks:
        hooks.append(
            block.module.register_forward_hook(lambda _, *call, block=block: ran(block, *call), with_kwargs=True)
        )
        seen: dict[Any, list[str]] = {}
        for name, linear in block.linears.items():
            hooks.append(
                linear.module.register_forward_pre_hook(
                    lambda _, args, block=block, name=name, seen=seen: reached(block, name, seen, args[0])
                )
            )
    try:
        _run(model, tokens, use_cache=True)
    finally:
        for handle in hooks:
            handle.remove()
    for block in blocks:
        if runs[block.index] != 1:
            raise ValueError(f"{block.name} runs {runs[block.index]} times in a forward pass; it must run exactly once")
        found = {name for group in block.groups for name in group}
        for name in block.linears.keys() - found:
            block.skipped[name] = "not reached by the forward pass that looks for linears"
        block.linears = {name: linear for name, linear in block.linears.items() if name in found}
        for name, parameter in block.module.named_parameters():
            if parameter.dim() == 3:
                block.skipped[f"{block.name}.{name}"] = "fused experts: each sees only some of the tokens"
    return blocks


def adopt(model: nn.Module, known: list[Block]) -> list[Block]:
    """The blocks of `model` with the groups that were discovered in another copy of it, such as its skeleton."""
    blocks = find(model)
    for block, other in zip(blocks, known, strict=True):
        block.linears = {name: block.linears[name] for name in other.linears}
        block.groups, block.skipped, block.tuple_length = other.groups, other.skipped, other.tuple_length
    return blocks


@torch.no_grad()
def first_inputs(model: nn.Module, blocks: list[Block], tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """Hidden states that enter the first block, (batch, length, hidden) a chunk; fills every block's `arguments`.

    The model runs up to its blocks only: each block is passed over, the last one ends the pass, so this costs an
    embedding look-up. Arguments (masks, positions, rotary tables, caches off) differ by block in some families
    (Gemma), so they are kept for every block, once for each batch size.

    Raises:
        ValueError: a block gets an argument that depends on the text itself, not on its shape alone.
    """
    caught: list[Tensor] = []

    def stand_in(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            known = block.arguments.setdefault(hidden.shape[0], (rest, kwargs))
            if not _same(known, (rest, kwargs)):
                raise ValueError(
                    f"{block.name} gets an argument that changes with the text ({', '.join(kwargs)}); "
                    "sparsekit can only prune blocks whose other arguments depend on the length alone"
                )
            if block.index == 0:
                caught.append(hidden)
            if block.index == len(blocks) - 1:
                raise _Stop
            return (hidden,) + (None,) * (block.tuple_length - 1) if block.tuple_length else hidden

        return forward

    for block in blocks:
        block.arguments.clear()
    for start in range(0, len(tokens), batch):
        for block in blocks:
            block.module.forward = stand_in(block)  # type: ignore[method-assign]
        try:
            _run(model, tokens[start : start + batch], use_cache=False)
        except _Stop:
            pass
        finally:
            for block in blocks:
                del block.module.forward
        yield caught.pop()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and torch.equal(a, b)))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
