"""Experts that a model holds in parameters of three dimensions, shown as ordinary linears that share their memory.

Everything that looks for linears finds those of each expert then: statistics, solvers, masks, training, proof. Nothing
is copied: a linear's weight is a view of the parameter, which `joined` gives back for saving.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")


class Piece(NamedTuple):
    """A part of a fused parameter: its own name inside the experts, the parameter's, and what takes it out of it."""

    name: str
    whole: str
    pick: Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """The experts of a fused module, as children "0", "1" ...: what a router sends tokens to.

    watched: somebody looks at what enters the linears. Beside its own tokens each expert is given a few others then, of
        which nothing is used: so that one which few tokens are sent to is not known by these alone
    tokens: of the whole text, of which a pass brings some; None: a pass brings all
    routed: how many tokens each expert was sent while it was watched
    kept: the experts that tokens can be sent to, by their numbers; None: all. See `structure.experts`
    observer: is told (expert, weights of its tokens, its outputs for them (tokens, hidden)); None: nobody asks
    leader: while watched, tokens go where they went in these experts, and count as they do there; None: where the
        router sends them
    counted: while a watched expert runs, what each row that enters it counts in its output: the router's weight for its
        own tokens, and for others the root mean square of all; None: not known
    """

    fused: Any  # not a child, whose parameters would count twice
    # other tokens that a watched expert is shown, in units of its inputs: where it has far more of its own they count
    # for little, and where it has fewer than inputs for most (benchmarks/experts.py)
    others: ClassVar[float] = 1.0
    weighed: ClassVar[bool] = True  # whether tokens count by the router's weights (benchmarks/experts.py)
    named: ClassVar[str] = ""  # the class of the fused module; empty: whatever has the interface

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.__dict__["fused"] = fused
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.pieces = self.cut_up(fused)
        for index in range(self.count):
            mine = [piece for piece in self.pieces if piece.name.startswith(f"{index}.")]
            self.add_module(str(index), _expert(mine))
        self.look()
        self.watched = False
        self.tokens: int | None = None
        self.routed = torch.zeros(self.count, dtype=torch.int64)
        self.leader: Experts | None = None
        self.kept: list[int] | None = None
        self.observer: Callable[[int, Tensor, Tensor], None] | None = None
        self.counted: Tensor | None = None
        self._sent: Any = None
        self._weights: Tensor | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this is a module of the kind."""
        if cls.named:
            return type(module).__name__ == cls.named
        down = getattr(module, "down_proj", None)
        return all(hasattr(module, name) for name in INTERFACE) and isinstance(down, Tensor) and down.dim() == 3

    def cut_up(self, fused: Any) -> list[Piece]:
        """The parts that its parameters consist of; sets `count`, the number of experts."""
        self.count = len(fused.down_proj)
        first = ("gate_up_proj", ("gate_proj", "up_proj")) if fused.has_gate else ("up_proj", ("up_proj",))
        return parts_of_whole(
            self.count,
            {first[0]: first[1], "down_proj": ("down_proj",)},
            transposed=fused.is_transposed,
            concatenated=fused.is_concatenated,
            biases=fused.has_bias,
        )

    def look(self) -> None:
        """Make every linear's parameters views of what the fused parameters are now."""
        for piece in self.pieces:
            whole = getattr(self.fused, piece.whole)
            put_parameter(self, piece.name, nn.Parameter(piece.pick(whole.detach()), requires_grad=whole.requires_grad))

    def gated(self, expert: Any, rows: Tensor) -> Tensor:
        """What enters an expert's last linear."""
        fused = self.fused
        if not fused.has_gate:
            hidden: Tensor = fused.act_fn(expert.up_proj(rows))
            return hidden
        gate, up = expert.gate_proj(rows), expert.up_proj(rows)
        both = torch.cat([gate, up], -1) if fused.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        gated: Tensor = fused._apply_gate(both)
        return gated

    def run(self, index: int, rows: Tensor, others: Tensor | None) -> Tensor:
        """An expert's outputs for rows. others: rows that it is shown besides."""
        expert: Any = self.get_submodule(str(index))
        shown = rows if others is None else torch.cat([rows, others])
        out: Tensor = expert.down_proj(self.gated(expert, shown))[: len(rows)]
        if getattr(self.fused, "has_post_expert_norm", False):
            out = self.fused.post_expert_norm(out)
        return out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the fused module's: each token through the experts that it is sent to, weighted. On the meta device, where
        nothing can be sent, every expert is given every token."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(rows)
        if rows.is_meta:
            for index in self.chosen:
                total = total + self.run(index, rows.clone(), None).to(total.dtype)
            return total.view(hidden_states.shape)
        sent = self._where(top_k_index, top_k_weights)
        for number, index in enumerate(self.chosen):
            tokens, place = torch.where(sent == number)
            others = self._others(index, rows)
            if others is None and not len(tokens):
                continue
            self._count(index, len(tokens))
            self.counted = self._counting(tokens, place, others)
            out = self.run(index, rows[tokens], others)
            if self.observer is not None:
                self.observer(index, top_k_weights[tokens, place], out)
            total.index_add_(0, tokens, (out * top_k_weights[tokens, place, None]).to(total.dtype))
        return self.beyond(total, rows, sent, top_k_weights).view(hidden_states.shape)

    @property
    def chosen(self) -> Sequence[int]:
        """The experts that tokens can be sent to, in the router's order."""
        return range(self.count) if self.kept is None else self.kept

    def beyond(self, total: Tensor, rows: Tensor, sent: Tensor, weights: Tensor) -> Tensor:
        """The total with what experts add that have no weights."""
        return total

    def _where(self, sent: Tensor, weights: Tensor | None = None) -> Tensor:
        """Where tokens go, (tokens, experts of each). weights: of the same shape, the router's"""
        if self.watched:
            self._sent = sent if self.leader is None else self.leader._sent
            self._weights = weights if self.leader is None else self.leader._weights
            return self._sent
        return sent

    def _count(self, index: int, tokens: int) -> None:
        if self.watched:
            self.routed[index] += tokens

    def _others(self, index: int, rows: Tensor) -> Tensor | None:
        """Rows from all over the text for a watched expert, the same ones every time; at least one."""
        if not self.watched:
            return None
        share = min(1.0, self.others * rows.shape[-1] / (self.tokens or len(rows)))
        count = max(1, round(share * len(rows)))
        chosen = torch.arange(count, device=rows.device) * len(rows) // count + index * len(rows) // self.count
        return rows[chosen % len(rows)]

    def _counting(self, tokens: Tensor, place: Tensor, others: Tensor | None) -> Tensor | None:
        if others is None or self._weights is None or not self.weighed:
            return None
        usual = self._weights.square().mean().sqrt()
        return torch.cat([self._weights[tokens, place], usual.expand(len(others))])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Experts":
        for piece in self.pieces:
            linear, kind = _place(self, piece.name)
            linear._parameters[kind] = None
        super()._apply(fn, recurse)  # what others have put beside the linears
        self.fused._apply(fn, recurse)  # moved or cast as a whole
        self.look()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Experts":
        copied = type(self)(copy.deepcopy(self.fused, memo)).train(self.training)
        copied.tokens, copied.kept = self.tokens, self.kept
        return copied


def parts_of_whole(
    count: int,
    names: dict[str, tuple[str, ...]],
    *,
    transposed: bool = False,
    concatenated: bool = True,
    biases: bool = False,
) -> list[Piece]:
    """names: a fused parameter (experts, out, in) -> the linears that its rows belong to.

    transposed: (experts, in, out) is stored; concatenated: one linear's rows after the other's, else in turns
    """

    def pick(index: int, part: int, parts: int, weight: bool) -> Callable[[Tensor], Tensor]:
        def take(whole: Tensor) -> Tensor:
            one = whole[index]
            one = one.t() if weight and transposed else one
            size = len(one) // parts
            return one[part * size : (part + 1) * size] if concatenated else one[part::parts]

        return take

    kinds = (("weight", ""), ("bias", "_bias")) if biases else (("weight", ""),)
    return [
        Piece(f"{index}.{linear}.{kind}", whole + end, pick(index, part, len(linears), kind == "weight"))
        for index in range(count)
        for whole, linears in names.items()
        for part, linear in enumerate(linears)
        for kind, end in kinds
    ]


def _expert(pieces: list[Piece]) -> nn.Module:
    """Modules for the linears of one expert, whose parameters are still to come."""
    if len(pieces) == 1:
        return nn.Linear(1, 1, bias=False, device="meta")
    expert = nn.Module()
    for name in dict.fromkeys(piece.name.split(".")[1] for piece in pieces):
        biased = any(piece.name.endswith(f"{name}.bias") for piece in pieces)
        expert.add_module(name, nn.Linear(1, 1, bias=biased, device="meta"))
    return expert


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module below `module` a parameter, and its sizes, by the parameter's name."""
    linear, kind = _place(module, name)
    setattr(linear, kind, parameter)
    if kind == "weight":
        linear.out_features, linear.in_features = parameter.shape


def _place(module: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds a parameter, and what it calls it; below an adapter that stands in its place."""
    inner, _, kind = name.rpartition(".")
    linear: Any = module.get_submodule(inner) if inner else module
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return linear, kind
