"""SparseLLM: the feed-forward part of each block is pruned as a whole, its attention linear by linear."""

import math
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

Roles = dict[str, tuple[str, slice]]  # gate, up, down -> a linear's name, and which of its rows
ALL = slice(None)
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
    is pruned by the solver alone, and so is a feed-forward part that is none of the known kind, with a warning. Gate
    and up may be halves of one linear (Phi-3, GLM-4): each is pruned as a linear of its own. The reported error of down
    is that of the part's output, with all that is pruned in it, against the dense part on the same inputs.

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
                self.local.answers = _joined(block, part[1], found.weights)
                down, error = part[1]["down"][0], found.errors[found.epoch]
                block.notes["sparsellm"] = {
                    "activation": part[0],
                    "epoch": found.epoch,
                    "errors": found.errors,
                    "objectives": found.objectives,
                }
        self.local.on_train_batch_start(trainer, walk, block, batch_idx)
        for name in self.local.answers:
            block.records[name]["seconds"] += seconds / len(self.local.answers)
        if part is not None:
            block.records[down]["error"] = error
        last = block.records[block.groups[-1][-1]]
        last["warnings"] = sorted({*last["warnings"], *(str(warning.message) for warning in caught)})

    def _solve(self, stream: BlockStream, block: Block, activation: str, roles: Roles) -> Found:
        given: dict[str, Any] = {}
        for role, (name, rows) in roles.items():
            given[role] = block.linears[name].weight[rows].float().contiguous()
            if role != "down":
                given[f"{role}_bias"] = _bias(block.linears[name].module, rows)
        torch.manual_seed(self.local.seed + block.index)
        store = ActivationStore(self.budget, self.folder)
        try:
            return prune_jointly(
                FeedForward(activation, **given),
                _inputs(stream, block, roles["gate"][0]),
                store,
                self.local.solver_of(roles["down"][0]),
                {role: self.local.patterns[name] for role, (name, _) in roles.items()},
                add_up=stream.team.sum,
                **self.options,
            )
        finally:
            store.close()


@torch.no_grad()
def find_part(block: Block, hidden: Tensor) -> tuple[str, Roles] | None:
    """The activation function of a block's feed-forward part and its linears: gate, up (not always), down.

    The part is found by what it does: one or two linears of one input, or one whose rows are two (halves, or every
    other one), and a later linear that is given phi(one) or phi(one) * other, for (sequences, length, hidden) that
    enter the block. In a parallel block others read the same input. None if no known function fits, as in a mixture of
    experts.
    """
    groups = [index for index in range(len(block.groups)) if block.expert_of(index) is None]
    seen: dict[int, Tensor] = {}
    block.until(hidden, groups, seen.__setitem__)
    for place, last in reversed(list(enumerate(groups))):
        for first in reversed(groups[:place]):
            if len(block.groups[last]) == 1 and (found := _fits(block, first, last, seen)) is not None:
                return found
    return None


def _fits(block: Block, first: int, last: int, seen: Mapping[int, Tensor]) -> tuple[str, Roles] | None:
    """The activation function and the roles, if linears of the group `first` make what enters the group `last`."""
    given = seen[last]
    inner = given.shape[-1]
    made = {name: block.linears[name].module(seen[first]).float() for name in block.groups[first]}  # type: ignore[operator]
    whole = {name: output for name, output in made.items() if output.shape == given.shape}
    ways: list[list[tuple[tuple[str, slice], Tensor]]] = []
    if 1 <= len(whole) <= 2:
        both = [((name, ALL), output) for name, output in whole.items()]
        ways += [both, both[::-1]]
    for name, output in made.items():
        if output.shape == (*given.shape[:-1], 2 * inner):
            for one, other in ((slice(inner), slice(inner, None)), (slice(None, None, 2), slice(1, None, 2))):
                fused = [((name, rows), output[..., rows]) for rows in (one, other)]
                ways += [fused, fused[::-1]]
    target = given.float().flatten()
    errors: dict[float, tuple[str, Roles]] = {}
    for (gate, output), *up in ways:
        factor = up[0][1] if up else 1.0
        for activation, jet in ACTIVATIONS.items():
            error = (jet(output)[0] * factor).flatten() - target
            roles = {"gate": gate, "down": (block.groups[last][0], ALL)} | ({"up": up[0][0]} if up else {})
            errors[float(error.norm() / target.norm())] = (activation, roles)
    least = min(errors, default=math.inf)
    return errors[least] if least <= max(1e-4, torch.finfo(given.dtype).eps) else None


def _joined(block: Block, roles: Roles, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each linear's weight (out, in), from those of the parts that it is."""
    found: dict[str, Tensor] = {}
    for role, (name, rows) in roles.items():
        whole = found.setdefault(name, weights[role].new_zeros(block.linears[name].shape))
        whole[rows] = weights[role]
    return found


@torch.no_grad()
def _inputs(stream: BlockStream, block: Block, name: str) -> Iterator[Tensor]:
    """What enters a linear of a block that is still dense, chunk by chunk."""
    group = next(index for index, names in enumerate(block.groups) if name in names)
    for chunk in stream.inputs:
        seen: dict[int, Tensor] = {}
        block.until(chunk, [group], seen.__setitem__)
        yield seen[group]


def _bias(module: Any, rows: slice) -> Tensor | float:
    return 0.0 if module.bias is None else module.bias.detach()[rows].float()
