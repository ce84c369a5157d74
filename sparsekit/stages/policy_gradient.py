"""Policy gradient: which structures stay is learned from the loss of the pruned model, by forward passes alone."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader

from sparsekit import registry
from sparsekit.contracts import Amount, Context, Count, Effect, Fit, Fraction, Kinds, Positive, declares, share
from sparsekit.model import patches, sees_images
from sparsekit.model.structure import FINE, Units, check_shape, choose, kinds_of, masking
from sparsekit.train import Checkpoints, PolicyGradient
from sparsekit.walk import Remove

RANDOM = ("random", "random-progressive")
EXPERTS = ("reap", "expert-frequency", "expert-activation")


@declares(Effect(cuts=True, moves=True, start="dense", processes="many", reads=("text", "images")))
def policy_gradient(
    context: Context,
    *,
    remove: Amount,
    units: Kinds | list[str] = "heads-and-channels",
    shape: Literal["free", "uniform", "serving"] | None = None,
    budgets: Literal["separate", "joint"] = "separate",
    initial: str | None = None,
    tokens: Count = 131072,
    projection: Literal["sigmoid-norm", "sigmoid-rank", "score-const"] | None = None,
    across: Literal["best", "block", "model"] = "best",
    sharpness: Positive | None = None,
    group: Count = 32,
    steps: Count = 600,
    masks: Count | None = None,
    batch: Count | None = None,
    length: Count = 128,
    learning_rate: Positive | None = None,
    baseline: Literal["leave-one-out", "moving-average", "initial", "none", "published"] = "leave-one-out",
    window: Count = 5,
    antithetic: bool = True,
    scaling: Literal["natural", "sqrt", "none"] = "natural",
    normalize: bool = True,
    floor: Annotated[float, Ge(0), Lt(0.5)] = 0.01,
    held_out: Fraction | None = None,
    compensate: bool | None = None,
    bias: bool = False,
    damping: Positive = 0.01,
) -> Fit:
    """Learn which heads, channels, layers or experts to remove by policy gradient; the model runs forward only.

    Every unit is kept with a probability s of its own. In a step some masks are drawn, the model's loss under each is
    measured on the same text, and s moves along the score-function estimate of the expected loss's gradient, then back
    into the budget. At the end the units with the highest s stay. Of vision models the loss is how far the features of
    all places are from the whole model's, so no labels are needed. The defaults are for small budgets, some thousand
    forward passes; the paper's are in recipes/papers/policy_gradient_llama2.yaml.

    remove: share of the blocks' parameters, such as "30%"
    units: heads-and-channels, mamba (channels of a Mamba, heads of a Mamba 2), parts (whole attentions and MLPs),
        layers, experts, or a list of the kinds
    shape: free; uniform: as many units in each block, which plain transformers loads; serving: whole attentions, and
        channels by 256, which vLLM runs by `sparsekit export RUN --to deci`; null: free, but of experts
        uniform, since their config has one number for all blocks
    budgets: separate for heads and channels, as in the paper, or joint, weighed by parameters
    initial: the scores that s starts from, of any installed criterion that scores these units; null: wanda-sp for heads
        and channels; for experts the one of reap, expert-frequency and expert-activation whose choice has the least
        loss on held-out text; else layer-perplexity, or of vision models block-influence. random, or
        random-progressive, which begins by removing 5 % and goes on
    tokens: of calibration text for these scores and for least squares, at most
    projection: of scores to probabilities: sigmoid-norm (Eq. A10), sigmoid-rank, the same from ranks, for scores with
        outliers, or score-const (A11); null: sigmoid-norm for heads and channels, else sigmoid-rank
    across: where sigmoid-norm takes mean and deviation, or sigmoid-rank its ranks: block, as published; model, for
        scores that compare between blocks, and always for parts and layers, of which a block has one; best, whichever
        of the two chooses the better mask on held-out text
    sharpness: of the sigmoid, 1 as published; larger ones draw masks nearer to the best one known; null: 8 for heads
        and channels, 4 for parts and layers, which are few, 2 for experts
    group: channels that share a probability, neighbours in the initial scores; 1 as published
    steps, masks, batch, length: masks are drawn in a step, each measured on `batch` sequences of `length` tokens; null:
        4 masks and 2 sequences, of experts, whose worth differs more from text to text, 8 and 4
    learning_rate: falls to 0 along a cosine; null: 0.05 for heads and channels, else 0.2
    baseline: what is subtracted from losses, independent of the mask, so that the gradient is not biased:
        leave-one-out (the mean of the masks drawn independently; of one antithetic pair the moving average),
        moving-average (of the losses of earlier steps, over `window`), initial (the loss of the same text under the
        mask that the start would choose, and then the moving average), none. published: Eq. 8, whose average begins
        at 0 and holds the step's own losses, and the published code's mean over one mask less than were drawn
    antithetic: draw masks in opposite pairs
    scaling: the gradient times s(1-s) (natural: the Fisher matrix's inverse), its root (sqrt), or as it is (none)
    normalize: divide by the running standard deviation of what the baseline leaves
    floor: s stays this far from 0 and 1, so that no unit is lost for good
    held_out: share of the calibration's sequences that chooses between start, way and end, and is seen by nothing else;
        0: the end is taken; null: an eighth, for experts a quarter
    compensate: least squares, see `wanda-sp`; null: for heads and channels. bias, damping: of that

    Several processes share the sequences of a step. Memory: that of a forward pass and a few numbers for each unit.
    Source: Bypass Back-propagation: Optimization-based Structural Pruning for LLMs via Policy Gradient, Algorithm 1.
    """
    kinds = kinds_of(units)
    images = sees_images(context.model)
    start, form = initial or _initial(kinds, images), _shape(shape, kinds)
    experts = kinds == ["experts"]
    held_out = _held_out(held_out, kinds)
    text, testing = _texts(context.tokens, None if images else length, held_out)
    each = patches(context.model) if images else text.shape[1]
    few = context.with_tokens(text[: max(1, tokens // each)])
    cutting = few.cutting(
        remove,
        kinds,
        shape=form,
        budgets=budgets,
        compensate=_fine(kinds) if compensate is None else compensate,
        bias=bias,
        damping=damping,
    )
    score: Callable[[], Tensor] | None = None
    if start not in RANDOM:
        score = partial(few.scores, start, cutting.units, share(remove))
    if experts and initial is None:
        score = partial(_best_of, few, cutting.units, share(remove), testing if len(testing) else text, form)
    module = PolicyGradient(
        context.model,
        context.blocks,
        cutting.units,
        text if images else _cut(text, length),
        testing if images else _cut(testing, length),
        score=score,
        remove=share(remove),
        steps=steps,
        masks=masks or (8 if experts else 4),
        batch=batch or (4 if experts else 2),
        learning_rate=learning_rate or (0.05 if _fine(kinds) else 0.2),
        shape=form,
        budgets=budgets,
        projection=projection or ("sigmoid-norm" if _fine(kinds) else "sigmoid-rank"),
        across=across,
        sharpness=sharpness or (8.0 if _fine(kinds) else 2.0 if experts else 4.0),
        group=group,
        baseline=baseline,
        window=window,
        antithetic=antithetic,
        scaling=scaling,
        normalize=normalize,
        floor=floor,
        progressive=start == "random-progressive",
        seed=context.seed,
        team=context.team,
        say=context.console.print,
    )
    data: Any = DataLoader(range(steps))  # type: ignore[arg-type]  # which text a step sees follows from its number
    bar = [RichProgressBar(leave=False, console_kwargs={"stderr": True})] if context.console.is_terminal else []
    return Fit(module, data, [Checkpoints(context.checkpoints), Remove(cutting), *bar])


def _check(options: Mapping[str, Any]) -> None:
    kinds = kinds_of(options["units"])
    check_shape(_shape(options["shape"], kinds), options["budgets"])
    initial = options["initial"] or _initial(kinds)
    if initial not in RANDOM:
        try:
            criterion: Any = registry.load("criteria", initial)
        except registry.UnknownName:
            valid = [*registry.names("criteria"), *RANDOM]
            raise ValueError(f"unknown initial `{initial}`, {registry.suggest(initial, valid)}") from None
        if others := set(kinds) - set(criterion.scoring.kinds):
            missing = " and ".join(sorted(others))
            raise ValueError(f"initial is {initial!r}, which has no scores for {missing}; leave it out")
    if options["bias"] and options["compensate"] is False:
        raise ValueError("bias: true is part of least squares; give compensate: true with it, or leave it out")
    if options["baseline"] == "leave-one-out" and options["masks"] == 1:
        raise ValueError("baseline leave-one-out compares masks of one step: give at least 2 as masks, or another one")
    if options["across"] == "best" and not _held_out(options["held_out"], kinds):
        raise ValueError("across: best is decided on held-out text: give a held_out above 0, or block or model")


policy_gradient.check = _check  # type: ignore[attr-defined]  # what options mean together


def _fine(kinds: list[str]) -> bool:
    return set(kinds) <= FINE


def _held_out(asked: float | None, kinds: list[str]) -> float:
    return asked if asked is not None else 0.25 if kinds == ["experts"] else 0.125


def _initial(kinds: list[str], images: bool = False) -> str:
    if kinds == ["experts"]:
        return "reap"
    if images and not _fine(kinds):
        return "block-influence" if kinds == ["layers"] else "random"
    return "wanda-sp" if _fine(kinds) else "layer-perplexity"


def _best_of(context: Context, units: Units, remove: float, text: Tensor, shape: str) -> Tensor:
    """The scores of the criterion whose choice of experts has the least loss on some text (sequences, length)."""
    losses: dict[float, Tensor] = {}
    with masking(context.blocks, units) as mask:
        for name in EXPERTS:
            mask(torch.ones(len(units), dtype=torch.bool))
            scores = context.scores(name, units, remove)
            mask(choose(units, scores, remove, shape=shape))
            losses[context.loss(text)] = scores
    return losses[min(losses)]


def _shape(asked: str | None, kinds: list[str]) -> str:
    return asked or ("uniform" if kinds == ["experts"] else "free")


def _texts(tokens: Tensor, length: int | None, held_out: float) -> tuple[Tensor, Tensor]:
    """The sequences of the calibration text that are learned from, by start and end too, and those held out of all.

    length: of the pieces that they are cut into; None: they are images
    """
    if length is not None and tokens.shape[1] < length:
        raise ValueError(
            f"length is {length}, but the calibration has sequences of {tokens.shape[1]} tokens; give at most that"
        )
    count, number = len(tokens), math.ceil(held_out * len(tokens) - 1e-9)
    if number >= count:
        raise ValueError(f"{count} sequences cannot be learned from with {number} held out; give more samples")
    testing = [count * (index + 1) // number - 1 for index in range(number)]  # evenly spread
    learning = sorted(set(range(count)) - set(testing))
    return tokens[learning], tokens[testing]


def _cut(tokens: Tensor, length: int) -> Tensor:
    """The same in pieces (sequences, length)."""
    return tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
