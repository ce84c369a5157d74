"""LoRA recovery: a low-rank update that keeps pruned weights zero, merged at the end without a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import nn

from sparsekit.contracts import Context, Count, Effect, Fit, Fraction, NotNegative, Positive, declares
from sparsekit.model import Block, Linear, kind_of, meant
from sparsekit.registry import suggest
from sparsekit.train import (
    Stored,
    TrainingSource,
    attach_updates,
    check_distillation,
    detach_updates,
    flat_parameters,
    mark_trained,
    precision,
    recovery_parts,
    recovery_reads,
    recovery_text,
    save_adapter,
)


def _effect(options: Mapping[str, Any]) -> Effect:
    """An update that is not merged stays beside the model, which is then what it was."""
    merged = bool(options["merge"])  # an adapter of peft is for language models
    found = Effect(moves=merged, unmerged=not merged, processes="many", divides=True, gradients=True)
    return replace(found, reads=recovery_reads(options)) if merged else found


@declares(_effect)
def lora(
    context: Context,
    *,
    rank: Count = 16,
    alpha: Positive | None = None,
    dropout: Fraction = 0.0,
    variant: Literal["masked", "scale", "prune"] = "masked",
    targets: list[str] | None = None,
    biases: bool = False,
    norms: bool = False,
    merge: bool = True,
    source: TrainingSource | None = None,
    tokens: Count = 300_000,
    steps: Count | None = None,
    length: Annotated[int, Ge(2)] | None = None,
    batch: Count = 4,
    accumulate: Count = 1,
    learning_rate: Positive = 2e-4,
    warmup: Fraction = 0.1,
    weight_decay: NotNegative = 0.0,
    validation: Fraction = 0.05,
    checks: Count = 8,
    patience: Count | None = 3,
    checkpointing: bool = False,
    distill: Annotated[float, Ge(0), Le(1)] = 0.0,
    temperature: Positive = 1.0,
    hidden: NotNegative = 0.0,
    cache: Annotated[int, Ge(0)] = 0,
    labels: Annotated[float, Ge(0), Le(1)] = 0.0,
) -> Fit:
    """Train a low-rank update of each linear on text, pruned weights staying zero, and merge it into the weights.

    A linear that is pruned element by element computes with W + mask * s (B A), s = alpha / rank; any other, as after
    a structural cut, with W + s (B A). The gradients are exact: a step costs three large products for each pruned
    linear where plain LoRA costs two, and no more memory. B begins at zero, so the model begins as it is.

    rank, alpha (null: 2 rank), dropout: of the update
    variant: masked, as above, MaskLoRA of PERP; scale, W * (1 + s (B A)), zeros kept as they are; prune, plain LoRA
        whose update is masked when the model is validated and merged, at plain LoRA's cost
    targets: which linears: parts of names such as q_proj or layers.3, ranges such as `blocks 4-11`, or attention, mlp,
        experts; null: all that the blocks have
    biases, norms: train those of the blocks too
    merge: false leaves the model as it is and writes the update beside it, into adapter/
    source: a name or a local file, or {source, its options, format}; null: the recipe's calibration text. JSON and
        Parquet files with `messages`, or with `instruction` and `output`, are records of which only the answers are
        predicted; `format` (auto, text, instruction, chat) overrules that
    tokens: read in training, of images patches, rounded down to whole steps; `steps` of the optimizer overrules it
    length: of a row; null: 512, or the model's positions if they are fewer. batch: rows at once. accumulate: batches in
        a step
    learning_rate: its peak, after a linear warm-up of the share `warmup` of all steps, before a cosine to zero
    validation: share of rows, of other text, which choose the best state, `checks` times on the way; the start is a
        candidate, so it never ends worse there. patience: checks without a better state that end it
    checkpointing: keep only what enters each block and run it again in the backward pass: less memory, more time
    distill: share of the loss that is the divergence from the dense model on the same text, both softened by
        `temperature`; the rest is the text's own loss. hidden: weight of the distance of hidden states, added to it
    cache: 0, the dense model runs along; else so many of its largest probabilities are kept on disk for each token,
        6 bytes each, before it begins
    labels: of an image classifier, the share of the loss that is the cross-entropy of the images' own classes; the rest
        is how far features are from the dense model's

    Source: Zimmer et al. 2023, PERP, arXiv 2312.15230; Hu et al. 2021, LoRA, arXiv 2106.09685.
    """
    linears = select(context.blocks, targets)
    widest = max(min(linear.shape) for linear in linears)
    if rank > widest:
        raise ValueError(f"rank is {rank}, and no linear has more than {widest} rows and columns: give at most that")
    reading = recovery_text(
        context,
        source=source,
        tokens=tokens,
        steps=steps,
        length=length,
        batch=batch,
        accumulate=accumulate,
        validation=validation,
        labels=labels,
    )
    masks = context.masks()
    chosen = {linear.name for linear in linears}
    pairs = [(block, name) for block in context.blocks for name in block.linears if name in chosen]
    inside = [name for block, name in pairs if kind_of(block, name) == "experts"]
    if not merge and not masks and inside:
        raise ValueError(
            f"merge: false writes an adapter of peft, which knows no linear called {min(inside)}: experts lie in one "
            "parameter there; merge, or give targets without experts"
        )
    summed = {f"{name}.weight" for name in chosen & masks.keys()} if variant != "prune" and not dropout else set()
    stored = Stored(context.model, wide=precision(context.device) == "32-true", narrow=summed)
    free = flat_parameters(context.blocks, biases, norms)
    layers = attach_updates(
        context.model,
        linears,
        masks,
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        dropout=dropout,
        variant=variant,
        stored={linear.name: stored.dtype(f"{linear.name}.weight") for linear in linears},
        seed=context.seed,
    )
    for parameter in free.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    leaves = {name: p for name, p in context.model.named_parameters() if p.requires_grad}
    called = {name: leaf for name, parameter in free.items() for leaf, p in leaves.items() if p is parameter}

    def switch(training: bool) -> None:
        for name in layers:  # by name: what runs may be a share of the layer
            context.model.get_submodule(name).train(training)
        stored.rounded(not training, {name: leaves[called[name]] for name in free})

    def finish() -> None:
        if not merge and context.team.rank == 0:
            context.notes["lora"]["adapter"] = "adapter"
            save_adapter(context.output / "adapter", layers, base=context.base)
        detach_updates(context.model, layers, merge=merge)
        merged = [f"{linear.name}.weight" for linear in linears] if merge else []
        mark_trained(context.blocks, [*free, *merged])
        stored.restore(free)

    return recovery_parts(
        context,
        "lora",
        leaves,
        reading,
        switch=switch,
        finish=finish,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        checks=checks,
        patience=patience,
        checkpointing=checkpointing,
        distill=distill,
        temperature=temperature,
        hidden=hidden,
        cache=cache,
        labels=labels,
    )


def _check(options: Mapping[str, Any]) -> None:
    if not options["merge"] and (options["biases"] or options["norms"]):
        raise ValueError(
            "merge: false writes the low-rank update alone, and biases and norms trained with it would be lost; "
            "leave them as they are, or merge"
        )
    check_distillation(options)


lora.check = _check  # type: ignore[attr-defined]  # what options mean together


def select(blocks: Sequence[Block], targets: list[str] | None) -> list[Linear]:
    """The linears whose names have one of the targets as a whole part of them, in the model's order; all for None.

    Raises:
        ValueError: there are none, or a target is no part of any linear's name.
    """
    linears = [linear for block in blocks for linear in block.linears.values() if _plain(linear)]
    if not linears:
        raise ValueError("the blocks have no linear that a low-rank update can be put beside")
    if targets is None:
        return linears
    if not targets:
        raise ValueError("targets is [], so nothing would be trained: name linears, or leave it out for all")
    pairs = [(block, linear) for block in blocks for linear in block.linears.values() if _plain(linear)]
    for target in targets:
        if not any(meant(block, linear.name, target) for block, linear in pairs):
            roles = {part for linear in linears for part in linear.name.split(".")[-2:]}
            raise ValueError(f"no linear is called `{target}`, {suggest(target, roles)}")
    return [linear for block, linear in pairs if any(meant(block, linear.name, target) for target in targets)]


def _plain(linear: Linear) -> bool:
    """Whether a linear computes x W' + b; some families have classes that read their input in groups."""
    return linear.transposed or computes_linear(type(linear.module))  # type: ignore[arg-type]


@cache
def computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a class of linears computes x W' + b, whatever it calls it: a small one is tried (Falcon's does)."""
    if getattr(kind, "forward", None) is nn.Linear.forward:
        return True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            small: Any = kind(4, 3)
            x = torch.randn(2, 4)
            return torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), atol=1e-6)
    except (TypeError, RuntimeError, AttributeError):  # not made of two numbers
        return False
