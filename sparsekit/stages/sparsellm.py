"""SparseLLM: the feed-forward part of each block is pruned as a whole, its attention linear by linear."""

import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from sparsekit.contracts import Context, Effect, Fit, declares
from sparsekit.maths import ACTIVATIONS
from sparsekit.model import Block
from sparsekit.recipe import SolverChain, grid_of
from sparsekit.system import ActivationStore, tight
from sparsekit.train import FeedForward, Found, prune_jointly
from sparsekit.walk import BlockStream, OneShot, Walk, leave_dense

CORRECTIONS = ("prefix", "none")


def _effect(options: Mapping[str, Any]) -> Effect:
    return Effect(
        prunes=True,
        moves=True,
        start="dense",
        grid=grid_of(options["solver"]),
        reads=("text", "images"),
        corrections=CORRECTIONS,
        processes="many",
        walks=True,
    )


@declares(_effect)
def sparsellm(
    context: Context,
    *,
    solver: SolverChain = "sparsegpt",
    alpha: Annotated[float, Gt(0)] = 1.0,
    beta: Annotated[float, Gt(0)] = 1.0,
    gamma: Annotated[float, Gt(0)] = 1.0,
    relative: bool = True,
    epochs: Annotated[int, Ge(0)] = 4,
    damping: Annotated[float, Ge(0)] = 0.01,
    settle: bool | None = None,
    last: bool = False,
    first_half_only: bool = False,
) -> Fit:
    """Prune each feed-forward part towards its dense output, not towards the dense outputs of its linears.

    Alternating minimisation over sparse weights and auxiliary activations, see `feedforward.joint`. Every other linear
    is pruned by the solver alone, and so is a feed-forward part that is none of the known kind, with a warning.

    solver: a solver's name, {name: options}, or a list of these, a chain
    alpha, beta, gamma: penalties on the outputs of gate and up, on the output of down, and on the hidden activations
    relative: they are in units of the dense energies; false: as in the paper, where the repository has 0.1 each for OPT
        and 5 each for LLaMA
    epochs: of the alternation; 0 is the solver alone. The published K steps are K - 1 here, as the first prunes alone
    damping: the ridge that stands for the paper's pseudo-inverse, in units of the Gram's mean diagonal
    settle: down is pruned once more for what the sparse gate and up give it; false is the paper, null where there are
        at least 4 calibration tokens for each input of down, as fewer would be overfitted
    last: take every new weight, and those of the last epoch, as published; false: a weight that fits its target less
        well is not taken, and the epoch of the lowest error is kept
    first_half_only: leave the second half of the blocks dense, as in the paper's tables

    Source: Bai et al. 2024, SparseLLM: Towards Global Pruning of Pre-trained Language Models, Eq. 4 to 13.
    Raises ValueError for an error correction other than prefix and none.
    """
    if context.error_correction not in CORRECTIONS:
        raise ValueError(
            f"sparsellm cannot have error_correction {context.error_correction}: its target is the block's own "
            "dense output on the same inputs; choose prefix or none"
        )
    share = context.activations // 2  # the other half for what enters the blocks
    stream = context.stream(budget=share)
    joint = SparseLLM(
        OneShot(context.solver(solver), context.patterns, context.seed),
        len(context.blocks) // 2 if first_half_only else len(context.blocks),
        budget=share,
        folder=context.scratch,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        relative=relative,
        epochs=epochs,
        damping=damping,
        settle=settle,
        last=last,
    )
    return Fit(Walk(stream), stream, [joint])


class SparseLLM(Callback):
    """Prunes a block's feed-forward part jointly and everything else as `local` does.

    blocks: how many from the first on are pruned; the others stay dense, and their records say so
    budget, folder: of the activations of a feed-forward part, see `ActivationStore`
    options: of `prune_jointly`

    `block.notes["sparsellm"]`: the activation function found, the epoch that was kept, the relative errors of the
    part's output and the objectives.
    """

    def __init__(
        self, local: OneShot, blocks: int, *, budget: int = 10**9, folder: str | Path | None = None, **options: Any
    ):
        self.local, self.blocks, self.budget, self.folder, self.options = local, blocks, budget, folder, options

    def on_train_batch_start(self, trainer: Trainer, walk: Walk, block: Block, batch_idx: int) -> None:  # type: ignore[override]
        """Prune the block.

        Raises:
            ValueError: as `OneShot` does.
        """
        if block.index >= self.blocks:
            for name in block.linears:
                leave_dense(block, name, "left dense: first_half_only prunes the first half of the blocks alone")
            return
        if not block.groups:
            return
        part, seconds = walk.stream.team.tell(find_part(block, walk.stream.inputs[0]), 0), 0.0
        self.local.answers = {}
        with warnings.catch_warnings(record=True) as caught, tight():
            warnings.simplefilter("always")
            if part is None:
                warnings.warn(
                    f"{block.name} has no feed-forward part that sparsellm knows; each linear was pruned by itself",
                    stacklevel=2,
                )
            else:
                started = time.perf_counter()
                found = self._solve(walk.stream, block, *part)
                seconds = time.perf_counter() - started
                self.local.answers = {part[1][role]: weight for role, weight in found.weights.items()}
                block.notes["sparsellm"] = {
                    "activation": part[0],
                    "epoch": found.epoch,
                    "errors": found.errors,
                    "objectives": found.objectives,
                }
        self.local.on_train_batch_start(trainer, walk, block, batch_idx)
        for name in self.local.answers:
            block.records[name]["seconds"] += seconds / len(self.local.answers)
        last = block.records[block.groups[-1][-1]]
        last["warnings"] = sorted({*last["warnings"], *(str(warning.message) for warning in caught)})

    def _solve(self, stream: BlockStream, block: Block, activation: str, roles: Mapping[str, str]) -> Found:
        linears = {role: block.linears[name] for role, name in roles.items()}
        given: dict[str, Any] = {role: linear.weight.float().contiguous() for role, linear in linears.items()}
        given |= {f"{role}_bias": _bias(linear.module) for role, linear in linears.items() if role != "down"}
        torch.manual_seed(self.local.seed + block.index)
        store = ActivationStore(self.budget, self.folder)
        try:
            return prune_jointly(
                FeedForward(activation, **given),
                _inputs(stream, block, roles["gate"]),
                store,
                self.local.solver,
                {role: self.local.patterns[name] for role, name in roles.items()},
                add_up=stream.team.sum,
                **self.options,
            )
        finally:
            store.close()


@torch.no_grad()
def find_part(block: Block, hidden: Tensor) -> tuple[str, dict[str, str]] | None:
    """The activation function of a block's feed-forward part and its linears: gate, up (not always), down -> name.

    The part is found by what it does: one or two linears of one input, and a later one that is given phi(one) or
    phi(one) * other, for (sequences, length, hidden) that enter the block. In a parallel block others read the same
    input. None if no known function fits, as in a mixture of experts.
    """
    groups = [index for index in range(len(block.groups)) if block.expert_of(index) is None]
    seen: dict[int, Tensor] = {}
    block.until(hidden, groups, seen.__setitem__)
    for place, last in reversed(list(enumerate(groups))):
        for first in reversed(groups[:place]):
            if len(block.groups[last]) == 1 and (found := _fits(block, first, last, seen)) is not None:
                return found
    return None


def _fits(block: Block, first: int, last: int, seen: Mapping[int, Tensor]) -> tuple[str, dict[str, str]] | None:
    """The activation function and the roles, if linears of the group `first` make what enters the group `last`."""
    given = seen[last]
    linears = {name: block.linears[name].module for name in block.groups[first]}
    wide = [name for name in linears if block.linears[name].shape[0] == given.shape[-1]]
    outputs = {name: linears[name](seen[first]).float() for name in wide if len(wide) <= 2}
    if not outputs or any(output.shape != given.shape for output in outputs.values()):
        return None
    target = given.float().flatten()
    errors = {}
    for gate in outputs:
        up = [name for name in outputs if name != gate]
        factor = outputs[up[0]] if up else 1.0
        for activation, jet in ACTIVATIONS.items():
            error = (jet(outputs[gate])[0] * factor).flatten() - target
            errors[float(error.norm() / target.norm())] = (
                activation,
                {"gate": gate} | dict(zip(["up"], up, strict=False)),
            )
    least = min(errors)
    if not least <= max(1e-4, torch.finfo(given.dtype).eps):
        return None
    activation, roles = errors[least]
    return activation, roles | {"down": block.groups[last][0]}


@torch.no_grad()
def _inputs(stream: BlockStream, block: Block, name: str) -> Iterator[Tensor]:
    """What enters a linear of a block that is still dense, chunk by chunk."""
    group = next(index for index, names in enumerate(block.groups) if name in names)
    for chunk in stream.inputs:
        seen: dict[int, Tensor] = {}
        block.until(chunk, [group], seen.__setitem__)
        yield seen[group]


def _bias(module: Any) -> Tensor | float:
    return 0.0 if module.bias is None else module.bias.detach().float()
