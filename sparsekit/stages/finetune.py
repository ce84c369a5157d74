"""Fine-tuning on text with pruned weights staying zero: all that is left of the blocks, or norms and biases alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch import Tensor

from sparsekit.contracts import Context, Count, Effect, Fit, Fraction, NotNegative, Positive, declares
from sparsekit.model import Block, Linear
from sparsekit.train import (
    Stored,
    TrainingSource,
    check_distillation,
    flat_parameters,
    mark_trained,
    masked_gradient,
    precision,
    recovery_parts,
    recovery_reads,
    recovery_text,
)

RATES = {"all": 1e-4, "norms-and-biases": 2e-3}


@declares(
    lambda options: Effect(moves=True, processes="many", divides=True, gradients=True, reads=recovery_reads(options))
)
def finetune(
    context: Context,
    *,
    trainable: Literal["all", "norms-and-biases"] = "all",
    source: TrainingSource | None = None,
    tokens: Count = 300_000,
    steps: Count | None = None,
    length: Annotated[int, Ge(2)] | None = None,
    batch: Count = 4,
    accumulate: Count = 1,
    learning_rate: Positive | None = None,
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
    """Train the blocks' own parameters on text; pruned weights stay zero bit for bit.

    Gradients are masked before the optimizer sees them, so its momentum is zero where a weight is pruned, and what
    weight decay makes of zero is zero. What is trained is float32 meanwhile, whatever the model is stored in, and is
    validated as it will be stored. Embeddings, the head and the last norm stay as they are.

    trainable: all, every parameter of the blocks; norms-and-biases, those with one dimension (the cheap variant of
        PERP)
    learning_rate: its peak; null: 1e-4 for all, 2e-3 for norms-and-biases
    All others: as in `lora`. A vision model learns from the dense model's features of images, in `lora` too.

    Source: Zimmer et al. 2023, PERP, arXiv 2312.15230; distillation: Hinton et al. 2015, arXiv 1503.02531.
    """
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
    masks = context.masks() if trainable == "all" else {}
    stored = Stored(context.model, wide=precision(context.device) == "32-true")
    leaves = flat_parameters(context.blocks)
    if trainable == "all":
        leaves = {f"{b.name}.{inner}": p for b in context.blocks for inner, p in b.module.named_parameters()}
    for parameter in leaves.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    held = {f"{linear.name}.weight": (linear, kept) for linear, kept in _pruned(context.blocks, masks)}
    hooks = []
    if not context.sharded:
        hooks = [masked_gradient(linear.module.weight, kept) for linear, kept in held.values()]  # type: ignore[arg-type]

    def finish() -> None:
        for hook in hooks:
            hook.remove()
        mark_trained(context.blocks, leaves)
        stored.restore(leaves)

    return recovery_parts(
        context,
        "finetune",
        leaves,
        reading,
        switch=lambda training: stored.rounded(not training, leaves),
        finish=finish,
        learning_rate=RATES[trainable] if learning_rate is None else learning_rate,
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
        masks={name: kept for name, (_, kept) in held.items()},
    )


finetune.check = check_distillation  # type: ignore[attr-defined]  # what options mean together


def _pruned(blocks: Iterable[Block], masks: Mapping[str, Tensor]) -> Iterator[tuple[Linear, Tensor]]:
    """The linears that have masks (linear's name -> kept, (out, in)), each with its own as its weight is stored.

    Raises:
        ValueError: a weight is not zero outside its mask.
    """
    for block in blocks:
        for name, linear in block.linears.items():
            if name in masks:
                if linear.weight.masked_select(~masks[name].to(linear.weight.device)).count_nonzero():
                    raise ValueError(f"the weight of {name} is not zero outside its mask, so there is no mask to keep")
                yield linear, linear.stored(masks[name])
