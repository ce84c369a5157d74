"""Experts in forms of their own, and how a model's fused modules of experts become linears and are put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.experts import Experts, Piece, parts_of_whole, put_parameter


class Flat(Experts):
    """DBRX: three matrices, experts below one another."""

    named = "DbrxExperts"

    def cut_up(self, fused: Any) -> list[Piece]:
        """The parts that its parameters consist of; sets `count`."""
        self.count, width = fused.num_experts, fused.ffn_hidden_size

        def rows(index: int, turned: bool) -> Callable[[Tensor], Tensor]:
            part = slice(index * width, (index + 1) * width)
            return lambda whole: whole[part].t() if turned else whole[part]

        names = (("gate_proj", "w1", False), ("up_proj", "v1", False), ("down_proj", "w2", True))
        return [
            Piece(f"{index}.{name}.weight", f"mlp.{whole}", rows(index, turned))
            for index in range(self.count)
            for name, whole, turned in names
        ]

    def __init__(self, fused: nn.Module):
        super().__init__(fused)
        del self.mlp

    def look(self) -> None:
        """Make every linear's parameters views again."""
        for piece in self.pieces:
            whole = self.fused.get_parameter(piece.whole)
            put_parameter(self, piece.name, nn.Parameter(piece.pick(whole.detach()), requires_grad=whole.requires_grad))

    def gated(self, expert: Any, rows: Tensor) -> Tensor:
        """What enters an expert's last linear."""
        gated: Tensor = self.fused.mlp.activation_fn(expert.gate_proj(rows)) * expert.up_proj(rows)
        return gated


class WithIdentities(Experts):
    """LongCat: some experts give back what they are given, and have no weights that are used."""

    named = "LongcatFlashExperts"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this is a module of the kind."""
        return super().fits(module) and module.gate_up_proj is not None

    def cut_up(self, fused: Any) -> list[Piece]:
        """The parts that its parameters consist of; sets `count`."""
        self.count = count = fused.num_routed_experts
        found = parts_of_whole(count, {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
        spare = [Piece("spare", "gate_up_proj", lambda whole: whole[count:])]  # rows that nothing reads
        return found + (spare if len(fused.gate_up_proj) > count else [])

    def gated(self, expert: Any, rows: Tensor) -> Tensor:
        """What enters an expert's last linear."""
        gated: Tensor = self.fused.act_fn(expert.gate_proj(rows)) * expert.up_proj(rows)
        return gated

    def beyond(self, total: Tensor, rows: Tensor, sent: Tensor, weights: Tensor) -> Tensor:
        """The total with the tokens that come back as they are, weighted."""
        share = (weights * (sent >= self.count)).sum(-1, keepdim=True)
        return total + (rows * share).to(total.dtype)


class Sorted(Experts):
    """Llama 4: every expert is given all tokens, multiplied by the router's score, which is zero for those not sent."""

    named = "Llama4TextExperts"

    def cut_up(self, fused: Any) -> list[Piece]:
        """The parts that its parameters consist of; sets `count`."""
        self.count = fused.num_experts
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        return parts_of_whole(self.count, names, transposed=True)

    def gated(self, expert: Any, rows: Tensor) -> Tensor:
        """What enters an expert's last linear."""
        gated: Tensor = expert.up_proj(rows) * self.fused.act_fn(expert.gate_proj(rows))
        return gated

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """As the fused module's, for (experts x tokens, hidden)."""
        parts = hidden_states.view(len(self.chosen), -1, hidden_states.shape[-1])
        pairs = zip(self.chosen, parts, strict=True)
        if parts.is_meta:
            return torch.cat([self.run(index, rows.clone(), None) for index, rows in pairs])
        return torch.cat([self._of(index, rows, parts) for index, rows in pairs])

    def _of(self, index: int, rows: Tensor, parts: Tensor) -> Tensor:
        tokens = rows.any(-1).nonzero().squeeze(1)
        self._count(index, len(tokens))
        others = None
        if self.watched:  # each token as the expert that it is sent to has it
            scores = parts.abs().amax(-1).argmax(0)
            others = self._others(index, parts[scores, torch.arange(parts.shape[1])])
        out = torch.zeros_like(rows)
        if len(tokens) or others is not None:
            out[tokens] = self.run(index, rows[tokens], others).to(out.dtype)
        if self.observer is not None:  # the score is in what it is given
            self.observer(index, torch.ones(len(tokens), device=out.device), out[tokens])
        return out


class Parallel(Experts):
    """JetMoE: one matrix for each expert; tokens come sorted by expert, with how many each has."""

    named = "JetMoeParallelExperts"

    def cut_up(self, fused: Any) -> list[Piece]:
        """The parts that its parameters consist of; sets `count`."""
        self.count = fused.num_experts
        return [
            Piece(f"{index}.weight", "weight", partial(torch.select, dim=0, index=index)) for index in range(self.count)
        ]

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:  # type: ignore[override]
        """As the fused module's, for rows (tokens, in) sorted by expert."""
        linears = [self.get_submodule(str(index)) for index in range(self.count)]
        if inputs.is_meta:
            return torch.stack([linear(inputs.clone()) for linear in linears]).sum(0)
        sizes = self._where(expert_size)
        out = []
        for index, (linear, rows) in enumerate(zip(linears, inputs.split(sizes), strict=True)):
            self._count(index, len(rows))
            others = self._others(index, inputs)
            shown = rows if others is None else torch.cat([rows, others])
            out.append(linear(shown)[: len(rows)])
        return torch.cat(out)


FORMS = (Experts, Flat, WithIdentities, Sorted, Parallel)


def split_experts(model: nn.Module) -> None:
    """Put `Experts` in the place of every module of fused experts whose form is known."""
    for name, module in list(model.named_modules()):
        form = next((form for form in FORMS if form.fits(module)), None)
        if form is not None:
            model.set_submodule(name, form(module))


@contextmanager
def as_linears(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model has `Experts` in the place of its own modules, if it did not have them already."""
    had = any(isinstance(module, Experts) for module in model.modules())
    split_experts(model)
    try:
        yield
    finally:
        if not had:
            join_experts(model)


def join_experts(model: nn.Module) -> None:
    """Put the model's own modules back; their parameters are what the views were written to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, module.fused)


@contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model or a part of it has its own modules of experts."""
    mine = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    for name, module in mine:
        model.set_submodule(name, module.fused)
    try:
        yield
    finally:
        for name, module in mine:
            model.set_submodule(name, module)


def pieces_of(model: nn.Module) -> dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]]:
    """A fused parameter's name -> names of the linears' parameters that it consists of, and what takes each out."""
    found: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for piece in module.pieces:
                found.setdefault(f"{name}.{piece.whole}", []).append((f"{name}.{piece.name}", piece.pick))
    return found
