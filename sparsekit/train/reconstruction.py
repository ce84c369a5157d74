"""Block reconstruction: train one block so that its outputs come near to given targets; pruned weights stay zero."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from sparsekit.contracts import Count, Fraction, NotNegative, Positive, misfit
from sparsekit.model import Block
from sparsekit.system import Team
from sparsekit.train.block_error import BlockError, Chunks
from sparsekit.train.schedule import cosine
from sparsekit.train.step import Progress, mean_gradients

OPTIONS: dict[str, Any] = {  # the ranges of `reconstruct`
    "trainable": Literal["all", "low-rank", "norms-and-biases"],
    "optimizer": Literal["adamw", "sgd"],
    "learning_rate": Positive,
    **dict.fromkeys(("epochs",), Annotated[int, Ge(0)]),
    **dict.fromkeys(("batch", "rank", "patience"), Count),
    **dict.fromkeys(("held_out", "warmup"), Fraction),
    "weight_decay": NotNegative,
}
CLIP = 1.0  # largest norm of a gradient, the error beginning at 1


def reconstruct(
    block: Block,
    inputs: Chunks,
    targets: Chunks,
    *,
    masks: Mapping[str, Tensor] | None = None,
    trainable: str = "all",
    epochs: int = 12,
    learning_rate: float = 1e-3,
    batch: int = 1,
    held_out: float = 0.05,
    warmup: float = 0.1,
    rank: int = 16,
    weight_decay: float = 0.0,
    patience: int = 3,
    per_token: bool = True,
    channels: Literal["alike", "energy"] | Tensor = "alike",
    optimizer: str = "adamw",
    seed: int = 0,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Lower the mean squared error between a block's outputs and `targets` by gradient steps, in place.

    inputs, targets: equally many chunks (sequences, length, hidden) of pairwise equal shape, at least two
    masks: linear's name -> the weights (out, in) that are kept; the others are zero and stay so, bit for bit, as their
        gradients are zeroed before the optimizer sees them. Linears that are not named are trained as dense ones.
    trainable: all (but what is left as it is, `Block.left`); low-rank (W + mask * (B A) for the linears, and the norms
        and biases; PERP, arXiv:2312.15230); or norms-and-biases (all parameters with one dimension)
    epochs: passes over the chunks; learning_rate: its peak, after a linear warm-up of the share `warmup` of all steps,
        from where it falls to zero along a cosine. batch: chunks in a step.
    held_out: share of the chunks, evenly spread, that are not trained on and choose the best epoch: the block never
        ends worse on them than it began, in its own dtype. 0: the training chunks choose.
    patience: epochs without a better state after which it ends. rank: of low-rank. seed: of the order of the chunks.
    per_token: each token's error is relative to the energy of its own target, as what comes next normalises token by
        token; to a tenth of the energies' geometric mean at least, so that a token of little energy counts no more
        than tenfold. The plain mean (false) looks at little but the first token of each sequence, whose activations
        are hundreds of times larger in many models.
    channels: what the error of each counts. In some models (Gemma) a few channels hold nearly all the energy, and what
        comes next makes them small again. alike: nothing is done; energy: one over the channel's mean share of its
        token's energy, a tenth of the typical share at least; or a weight for each channel (hidden,)
    optimizer: adamw, or sgd with a momentum of 0.9; weight_decay: of either
    team: processes that have the same block and other chunks. Gradients and errors are sums over all of them, each
        takes as many chunks as the one that has the fewest, and all end with the same block.

    The block runs in eval mode; it computes in float32 (float64 if it is), under autocast on an accelerator if it is
    stored in half precision. Memory beside the block: one float32 copy, its gradient and two moments (sgd: one) of what
    is trained; the best state is the block itself. It marks what it changed in `block.trained`.

    Returns:
        before, after: squared error over the target's mean square (by token, or of all), on the held-out chunks
        epochs, best_epoch (0: as it began), learning_rate, seconds
        held_out, train: the same error after each epoch, and its mean while training in it; None where not finite

    Raises:
        ValueError: options out of range, too few chunks, shapes that differ, inputs or targets that are not finite,
            weights outside their mask that are not zero.
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS}
    for name, value in given.items():
        if wrong := misfit(OPTIONS[name], value):
            raise ValueError(f"{name} {wrong}")
    started = time.perf_counter()
    task = BlockError(block, inputs, targets, team, per_token, channels)
    scale = task.mean_square()
    training, testing = _split(min(task.counts()), held_out)
    generator = torch.Generator().manual_seed(seed)
    leaves, effective = _leaves(block, masks or {}, trainable, rank, generator)
    steps: torch.optim.Optimizer
    if optimizer == "sgd":
        steps = torch.optim.SGD(leaves, momentum=0.9, weight_decay=weight_decay)
    else:
        steps = torch.optim.AdamW(leaves, weight_decay=weight_decay)
    share = cosine(epochs * math.ceil(len(training) / batch), warmup)

    def rate(step: int) -> float:
        return learning_rate * share(step)

    stored = {name: parameter.dtype for name, parameter in block.module.named_parameters()}
    mode = block.module.training
    block.module.eval()
    try:
        before = task.error({}, testing)
        if not math.isfinite(before):
            raise ValueError(f"the outputs of {block.name} are not finite, so it cannot be trained; look at its inputs")
        progress, best_epoch, train, test = Progress(patience, before), 0, [], []
        for epoch in range(1, epochs + 1):
            order = [training[i] for i in torch.randperm(len(training), generator=generator)]
            # gradients of an error that begins at 1, whatever the size of the activations
            train.append(_epoch(task, effective, steps, rate, order, batch, before or scale))
            with torch.no_grad():
                state = {name: tensor.to(stored[name]) for name, tensor in effective().items()}
            test.append(task.error(state, testing))
            if not math.isfinite(train[-1] + test[-1]):
                warnings.warn(
                    f"training of {block.name} diverged in epoch {epoch} and was ended; its best state before that is "
                    f"kept, a learning rate below {learning_rate} is better",
                    stacklevel=2,
                )
                break
            if progress.better(test[-1]):
                best_epoch = epoch
                _write(block, state)
            elif progress.over:
                break
    finally:
        block.module.train(mode)
    return {
        "before": before / scale,
        "after": progress.best / scale,
        "epochs": len(test),
        "best_epoch": best_epoch,
        "learning_rate": learning_rate,
        "seconds": time.perf_counter() - started,
        "held_out": [error / scale if math.isfinite(error) else None for error in test],
        "train": [error / scale if math.isfinite(error) else None for error in train],
    }


def _split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """The indices to train on and, evenly spread over the chunks, those held out: at least one of each."""
    if count < 2:
        raise ValueError(
            f"there is {count} chunk of activations; reconstruction needs at least 2, one to train on and one held "
            "out: give more samples or put fewer in a batch"
        )
    if held_out == 0:
        return list(range(count)), list(range(count))
    number = min(max(1, round(held_out * count)), count - 1)
    testing = [count * (index + 1) // number - 1 for index in range(number)]
    return sorted(set(range(count)) - set(testing)), testing


def _leaves(
    block: Block, masks: Mapping[str, Tensor], trainable: str, rank: int, generator: torch.Generator
) -> tuple[list[Tensor], Callable[[], dict[str, Tensor]]]:
    """What the optimizer moves, and a function that makes the block's parameters of it, by their inner names."""
    if unknown := masks.keys() - block.linears.keys():
        raise ValueError(f"masks name {min(unknown)}, which is no linear of {block.name}")
    parameters = {name: p for name, p in block.module.named_parameters() if p.is_floating_point()}
    wide = {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in parameters.items()
    }
    linears = {f"{name}.weight".removeprefix(f"{block.name}."): linear for name, linear in block.linears.items()}
    keep = {}
    for name, linear in linears.items():
        if linear.name in masks:
            keep[name] = linear.stored(masks[linear.name]).to(wide[name].device)
            if keep[name].shape != wide[name].shape or wide[name].masked_select(~keep[name]).count_nonzero():
                raise ValueError(f"the weight of {linear.name} is not zero outside its mask, or of another shape")
    low = [name for name in linears if trainable == "low-rank" and wide[name].ndim == 2]
    mine = [name for name in wide if name not in low and not block.left(name)]
    free = [name for name in mine if trainable == "all" or wide[name].ndim == 1]
    for name in free:
        wide[name].requires_grad_()
        if name in keep:
            wide[name].register_hook(lambda gradient, mask=keep[name]: gradient * mask)  # type: ignore[misc]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in low:
        rows, columns = wide[name].shape
        size = min(rank, rows, columns)
        right = torch.randn(size, columns, generator=generator) / math.sqrt(columns)
        factors[name] = (
            torch.zeros(rows, size).to(wide[name]).requires_grad_(),
            right.to(wide[name]).requires_grad_(),
        )

    def effective() -> dict[str, Tensor]:
        made = {name: wide[name] for name in free}
        for name, (left, right) in factors.items():
            update = left @ right
            made[name] = wide[name] + (update * keep[name] if name in keep else update)
        return made | {name: tensor for name, tensor in wide.items() if name not in made}

    return [wide[name] for name in free] + [factor for pair in factors.values() for factor in pair], effective


def _epoch(
    task: BlockError,
    effective: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    order: list[int],
    batch: int,
    unit: float,
) -> float:
    """One pass of gradient steps on the mean squared error in `unit`; returns its mean on the way."""
    total, seen, pending = 0.0, 0.0, 0
    for position, (x, y) in enumerate(task.pairs(order), start=1):
        with torch.enable_grad(), _autocast(task.block):
            loss = task.squared(effective(), x, y, torch.promote_types(x.dtype, torch.float32))
            (loss / unit).backward()  # type: ignore[no-untyped-call]
        total, seen, pending = total + float(loss.detach()), seen + y.numel(), pending + y.numel()
        if position % batch == 0 or position == len(order):
            _step(task, optimizer, rate, pending)
            pending = 0
    total, seen = task.sum(total, seen)
    return total / seen


def _step(task: BlockError, optimizer: torch.optim.Optimizer, rate: Callable[[int], float], elements: float) -> None:
    """Gradients were summed over elements, which half precision cannot lose; here they become those of the mean."""
    group = optimizer.param_groups[0]
    moved = [leaf for leaf in group["params"] if leaf.grad is not None]
    mean_gradients(moved, elements, task.team)
    torch.nn.utils.clip_grad_norm_(moved, CLIP)
    group["lr"] = rate(group.get("taken", 0))
    group["taken"] = group.get("taken", 0) + 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _autocast(block: Block) -> torch.autocast:
    dtype = next(block.module.parameters()).dtype
    half = dtype in (torch.float16, torch.bfloat16) and block.device.type != "cpu"
    return torch.autocast(block.device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


@torch.no_grad()
def _write(block: Block, state: dict[str, Tensor]) -> None:
    """Make a state the block's own, and note which parameters differ from what they were."""
    for name, parameter in block.module.named_parameters():
        if name in state and not torch.equal(parameter, state[name]):
            parameter.copy_(state[name]).add_(0.0)  # -0.0 becomes 0.0
            block.trained.add(name)
