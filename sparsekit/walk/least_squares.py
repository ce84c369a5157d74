"""Least-squares compensation: what stays of a part's output linear makes up for the units that are removed."""

import torch
from torch import Tensor

from sparsekit.maths import Stats, double
from sparsekit.model import Linear
from sparsekit.model.structure import Units
from sparsekit.walk.stream import BlockStream


def solve(
    weight: Tensor, stats: Stats, columns: Tensor, *, bias: bool = False, damping: float = 0.01
) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in), zero outside `columns` (kept,), whose outputs are nearest to the dense ones, and a bias.

    With S the columns: V_S = (W C)_S (G_SS + d I)^-1, d = damping mean(diag G_SS), C the cross moments, G the Gram (the
    closed form of OSSCAR, arXiv:2403.12983, and ZipLM, arXiv:2302.04089). bias: a constant 1 is one more input, so
    means are made up for as FLAP does (arXiv:2312.11983), and the weights for what is left; it is what is to be added
    to the linear's own bias (out,).

    Raises:
        ValueError: the weight or the inputs are not finite, or a bias is asked where targets come from other inputs.
    """
    stats.check_weight(weight)
    if bias and stats.drift_cross is not None:
        raise ValueError("a bias can be solved for only with error_correction prefix or none")
    solved = torch.zeros_like(weight)
    target = stats.target(weight)[:, columns]  # (out, kept)
    gram = double(stats.gram[columns][:, columns])  # (kept, kept)
    mean = stats.mean.to(weight)
    if bias:  # centred, which is the same as a constant input
        target = target - (weight @ mean)[:, None] * stats.total.to(weight)[columns]
        gram = gram - stats.count * double(torch.outer(mean[columns], mean[columns]))
    ridge = damping * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    solved[:, columns] = torch.cholesky_solve(double(target).t(), factor).t().to(weight)
    return solved, weight @ mean - solved @ mean if bias else None


@torch.no_grad()
def compensate(
    stream: BlockStream, units: Units, kept: Tensor, *, bias: bool = False, damping: float = 0.01
) -> dict[str, Tensor]:
    """Walk over the blocks and make up, in place, for the units that `kept` (units,) removes.

    Columns of removed units become zero. Whole layers cannot be made up for inside them: they stay as they are.

    Returns:
        the parameters that changed, by their names in the model: weights as stored, and biases (out,)
    """
    masks = units.split(kept.bool())
    changed: dict[str, Tensor] = {}
    for block in stream:
        assert block is not None
        block.to(stream.device)
        known = changed.keys() | {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
        pairs = zip(units.parts, masks, strict=True)
        parts = {part.output: (part, mask) for part, mask in pairs if part.block == block.index}
        for names, stats in stream.statistics(block):
            assert isinstance(stats, Stats)
            stats.check(names[0])
            for name in names:
                part, mask = parts.get(name, (None, None))
                if part is not None and mask is not None and not mask.all():
                    _write(changed, block.linears[name], stats, part.columns[mask].flatten(), bias, damping)
        stream.advance(block)
        for name in changed.keys() - known:  # biases that it did not have: the run adds them when it cuts
            block.module.get_submodule(name.removeprefix(f"{block.name}.").rpartition(".")[0]).bias = None  # type: ignore[assignment]
        block.to("cpu")
    return changed


def _write(
    changed: dict[str, Tensor], linear: Linear, stats: Stats, columns: Tensor, bias: bool, damping: float
) -> None:
    weight = linear.weight.float()
    columns = columns.to(weight.device)
    if not len(columns):  # gone, with its bias
        linear.write(torch.zeros_like(weight))
        if getattr(linear.module, "bias", None) is not None:
            linear.module.bias.zero_()  # type: ignore[operator,union-attr]
        return
    solved, extra = solve(weight, stats, columns, bias=bias, damping=damping)
    linear.write(solved)
    changed[f"{linear.name}.weight"] = linear.stored(linear.weight).cpu().clone()
    if extra is not None:
        add_bias(linear, extra)
        changed[f"{linear.name}.bias"] = linear.module.bias.detach().cpu().clone()  # type: ignore[operator,union-attr]


@torch.no_grad()
def add_bias(linear: Linear, extra: Tensor) -> None:
    """Add (out,) to a linear's bias; one that has none gets one."""
    if getattr(linear.module, "bias", None) is None:
        linear.module.bias = torch.nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    linear.module.bias.add_(extra.to(linear.weight))  # type: ignore[operator,union-attr]
