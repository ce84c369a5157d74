"""How much a model's loss depends on what leaves its blocks and its linears: one backward pass, block by block."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit.model import Block, Said, filled, first_inputs, passed_over
from sparsekit.system import ActivationStore, Team, write_atomically, write_tensors
from sparsekit.train.head import summed
from sparsekit.train.losses import text_loss
from sparsekit.train.whole import frozen

SEQUENCES = 16  # of each process; more change the weights little


def channel_gradients(model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device) -> list[Tensor]:
    """Mean squares (hidden,) of the loss's gradient with respect to the channels of what leaves each block, float32.

    The diagonal of the loss's Fisher information, its mean over tokens: BRECQ (Li et al. 2021, arXiv 2102.05426,
    section 3.2) weighs each number of a block's output by its own. The loss is that of the next token, a sum; the first
    token of a sequence, which all others look at, does not count.

    tokens: (sequences, length), text alone; memory: see `_backwards`
    """
    found: list[Tensor] = []
    for _, gradients in _backwards(model, blocks, tokens, device, lambda _: nullcontext()):
        squares = [gradient[:, 1:].float().square().mean(dim=(0, 1)) for gradient in gradients]
        found.append(torch.stack(squares).mean(0).cpu())
    return found[::-1]


def curvature(
    model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Every linear's name, weight (out, in), Gram matrix of its inputs (in, in) and mean squares (out,) of the loss's
    gradient with respect to its outputs, the last block first, in float32.

    By them the loss's rise with a change D of a weight is about half of sum_i squares_i (D Gram D^T)_ii. Both are of
    the tokens that come by the linear, but for the first of a sequence, which is like no other; an expert's of those
    that it is sent. Where none comes by they are zero.

    tokens: (sequences, length), text alone; memory: see `_backwards`, and the Gram matrices of a block
    """
    grams: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    @contextmanager
    def watch(block: Block) -> Iterator[None]:
        firsts = {group[0] for group in block.groups}
        hooks = [
            linear.module.register_forward_hook(partial(saw, name, name in firsts))
            for name, linear in block.linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def saw(name: str, first: bool, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if first:
            rows = _rows(args[0].detach())
            if name not in grams:
                grams[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            grams[name].addmm_(rows.T, rows)
        if out.requires_grad:
            out.register_hook(partial(add, name))

    def add(name: str, gradient: Tensor) -> None:
        rows = _rows(gradient.detach())
        squares[name] = squares.get(name, 0.0) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    for block, _ in _backwards(model, blocks, tokens, device, watch):
        for group in block.groups:
            for name in group:
                weight = block.linears[name].weight.float()
                if counts.get(name):
                    yield name, weight, grams[group[0]], squares[name] / counts[name]
                else:
                    yield name, weight, weight.new_zeros(2 * weight.shape[1:]), weight.new_zeros(len(weight))
        for known in (grams, squares, counts):
            known.clear()


def _rows(seen: Tensor) -> Tensor:
    """Of (sequences, length, features) all places but the first, of (tokens, features) all; (rows, features)."""
    return (seen[:, 1:] if seen.dim() > 2 else seen).reshape(-1, seen.shape[-1]).float()


def _backwards(
    model: nn.Module,
    blocks: list[Block],
    tokens: Tensor,
    device: torch.device,
    watch: Callable[[Block], AbstractContextManager[None]],
) -> Iterator[tuple[Block, list[Tensor]]]:
    """Each block, the last one first, and for every sequence the gradient of its loss with respect to what leaves it.

    A block's own backward pass has run by then, under `watch(block)`, and it is filled still. Block by block, there and
    back, so that blocks may rest on disk; what enters each block is kept in CPU memory meanwhile: sequences x length x
    hidden x blocks numbers.
    """
    store = ActivationStore(budget=2**62)
    try:
        with frozen(model):
            entered = _entered(model, blocks, tokens, device, store)
            rows = zip(tokens, store, strict=True)
            gradients = [_of_head(model, blocks, ids[None].to(device), hidden) for ids, hidden in rows]
            for block in reversed(blocks):
                with filled([block], device):
                    pairs = zip(entered.pop(), gradients, strict=True)
                    with watch(block):
                        before = [_back(block, hidden, gradient) for hidden, gradient in pairs]
                    yield block, gradients
                gradients = before
    finally:
        store.close()


@torch.no_grad()
def _entered(
    model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device, store: ActivationStore
) -> list[list[Tensor]]:
    """What enters each block, a sequence at a time; what leaves the last one is in the store afterwards."""
    for hidden in first_inputs(model, blocks, tokens.to(device), 1):
        store.append(hidden)
    entered: list[list[Tensor]] = []
    for block in blocks:
        with filled([block], device):
            entered.append(list(store))
            for index, hidden in enumerate(entered[-1]):
                store[index] = block(hidden)
    return entered


@torch.enable_grad()
def _of_head(model: Any, blocks: list[Block], ids: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of the loss of one sequence with respect to what leaves the last block."""
    leaf = hidden.to(ids.device).detach().requires_grad_()
    with passed_over(blocks, leaf):
        loss = summed(Said(model, ids), lambda logits, places: text_loss(logits, ids[:, places + 1]))
    [gradient] = torch.autograd.grad(loss, leaf)
    return gradient


@torch.enable_grad()
def _back(block: Block, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to what enters a block, of that with respect to what leaves it."""
    leaf = hidden.to(gradient.device).detach().requires_grad_()
    if hasattr(hidden, "place"):
        leaf.place = hidden.place  # type: ignore[attr-defined]  # where its arguments are found
    [found] = torch.autograd.grad(block.with_parameters({}, leaf), leaf, gradient)
    return found


def channel_weights(
    file: Path, model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device, team: Team
) -> list[Tensor]:
    """The same over all processes, each block's with a mean of 1: weights of its channels' errors.

    file: they are kept there, since a model that is pruned in part has others.
    """
    if file.is_file():
        kept = load_file(file)
        return [kept[str(block.index)] for block in blocks]
    found = channel_gradients(model, blocks, tokens[:SEQUENCES], device)
    team.sum(found)
    weights = [each / each.mean().clamp_min(torch.finfo(torch.float32).tiny) for each in found]
    if team.rank == 0:
        tensors = {str(block.index): each for block, each in zip(blocks, weights, strict=True)}
        write_atomically(file, lambda aside: write_tensors(aside, tensors))
    return weights
