"""Policy gradient: which structures stay is learned from the loss of the pruned model, by forward passes alone."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from sparsekit import registry
from sparsekit.model.structure import check_kinds as check_units
from sparsekit.model.structure import check_shape as check_choice
from sparsekit.model.structure import share
from sparsekit.recipe import at_least
from sparsekit.run import Work
from sparsekit.train import Checkpoints, PolicyGradient

Initial = Literal[
    "wanda-sp", "flap", "llm-pruner", "layer-perplexity", "block-influence", "random", "random-progressive"
]
FINE = ("wanda-sp", "flap", "llm-pruner")  # these score heads and channels, the other methods layers or parts
UNITS = {"heads-and-channels": ["heads", "channels"], "parts": ["attention", "mlp"], "layers": ["layers"]}
TESTING = 32  # sequences that are held out, at most
COUNTS = ("tokens", "group", "steps", "masks", "batch", "length", "window")


def policy_gradient(
    work: Work,
    *,
    remove: str | float,
    units: list[str] | str = "heads-and-channels",
    shape: Literal["free", "uniform"] = "free",
    budgets: Literal["separate", "joint"] = "separate",
    initial: Initial | None = None,
    tokens: int = 131072,
    projection: Literal["sigmoid-norm", "sigmoid-rank", "score-const"] | None = None,
    across: Literal["best", "block", "model"] = "best",
    sharpness: float | None = None,
    group: int = 32,
    steps: int = 600,
    masks: int = 4,
    batch: int = 2,
    length: int = 128,
    learning_rate: float | None = None,
    baseline: Literal["leave-one-out", "moving-average", "initial", "none"] = "leave-one-out",
    window: int = 5,
    antithetic: bool = True,
    scaling: Literal["natural", "sqrt", "none"] = "natural",
    normalize: bool = True,
    floor: float = 0.01,
    held_out: float = 0.125,
    compensate: bool | None = None,
    bias: bool = False,
    damping: float = 0.01,
) -> tuple[LightningModule, Any, list[Callback]]:
    """Learn which heads, channels or layers to remove by policy gradient; the model runs forward only.

    Every unit is kept with a probability s of its own. In a step some masks are drawn, the model's loss under each is
    measured on the same text, and s moves along the score-function estimate of the expected loss's gradient, then back
    into the budget. At the end the units with the highest s stay. The defaults are for small budgets, some thousand
    forward passes; the paper's are in recipes/policy_gradient_paper.yaml.

    remove: share of the blocks' parameters, such as "30%"
    units: heads-and-channels, parts (whole attentions and MLPs), layers, or a list of the kinds
    shape: free, or uniform: as many units in each block, which plain transformers loads
    budgets: separate for heads and channels, as in the paper, or joint, weighed by parameters
    initial: the scores that s starts from; null: wanda-sp for heads and channels, else layer-perplexity. random, or
        random-progressive, which begins by removing 5 % and goes on
    tokens: of calibration text for these scores and for least squares, at most
    projection: of scores to probabilities: sigmoid-norm (Eq. A10), sigmoid-rank, the same from ranks, for scores with
        outliers, or score-const (A11); null: sigmoid-norm for heads and channels, else sigmoid-rank
    across: where sigmoid-norm takes mean and deviation, or sigmoid-rank its ranks: block, as published; model, for
        scores that compare between blocks, and always for parts and layers, of which a block has one; best, whichever
        of the two chooses the better mask on held-out text
    sharpness: of the sigmoid, 1 as published; larger ones draw masks nearer to the best one known; null: 8 for heads
        and channels, 4 for parts and layers, which are few
    group: channels that share a probability, neighbours in the initial scores; 1 as published
    steps, masks, batch, length: masks are drawn in a step, each measured on `batch` sequences of `length` tokens
    learning_rate: falls to 0 along a cosine; null: 0.05 for heads and channels, 0.2 for parts and layers
    baseline: what is subtracted from losses: leave-one-out (the mean of the other masks), moving-average (Eq. 8, over
        `window` steps), initial (the loss of the same text under the mask that the start would choose, and then the
        moving average), none
    antithetic: draw masks in opposite pairs
    scaling: the gradient times s(1-s) (natural: the Fisher matrix's inverse), its root (sqrt), or as it is (none)
    normalize: divide by the running standard deviation of what the baseline leaves
    floor: s stays this far from 0 and 1, so that no unit is lost for good
    held_out: share of the calibration text that chooses between start, way and end; 0: the end is taken
    compensate: least squares, see `wanda-sp`; null: for heads and channels. bias, damping: of that

    Several processes share the sequences of a step. Memory: that of a forward pass and a few numbers for each unit.
    Source: Bypass Back-propagation: Optimization-based Structural Pruning for LLMs via Policy Gradient, Algorithm 1.
    """
    check(locals())
    kinds = _kinds(units)
    start = initial or _initial(kinds)
    few = replace(work, tokens=work.tokens[: max(1, tokens // work.tokens.shape[1])])
    found, ending = few.removal(
        remove,
        kinds,
        shape=shape,
        budgets=budgets,
        compensate=_fine(kinds) if compensate is None else compensate,
        bias=bias,
        damping=damping,
    )
    text, testing = _texts(work.tokens, length, held_out)
    score = None
    if not start.startswith("random"):
        method = import_module(f"sparsekit.criteria.{registry.normal(start)}")
        score = partial(method.scores, few, found, remove)
    module = PolicyGradient(
        work.model,
        work.blocks,
        found,
        text,
        testing,
        score=score,
        remove=share(remove),
        steps=steps,
        masks=masks,
        batch=batch,
        learning_rate=learning_rate or (0.05 if _fine(kinds) else 0.2),
        shape=shape,
        budgets=budgets,
        projection=projection or ("sigmoid-norm" if _fine(kinds) else "sigmoid-rank"),
        across=across,
        sharpness=sharpness or (8.0 if _fine(kinds) else 4.0),
        group=group,
        baseline=baseline,
        window=window,
        antithetic=antithetic,
        scaling=scaling,
        normalize=normalize,
        floor=floor,
        progressive=start == "random-progressive",
        seed=work.seed,
        team=work.team,
        say=work.console.print,
    )
    data: Any = DataLoader(range(steps))  # type: ignore[arg-type]  # which text a step sees follows from its number
    return module, data, [Checkpoints(work.checkpoints), ending]


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options, all of them by name, that are out of range alone or together."""
    given = {name: options[name] for name in registry.options(policy_gradient)}
    for problem in registry.option_problems(policy_gradient, given).values():
        raise ValueError(problem)
    kinds = _kinds(options["units"])
    check_units(kinds)
    check_choice(options["shape"], options["budgets"])
    initial = options["initial"] or _initial(kinds)
    if not initial.startswith("random") and _fine(kinds) != (initial in FINE):
        raise ValueError(f"initial is {initial!r}, which has no scores for {' and '.join(kinds)}; leave it out")
    at_least(1, **{name: options[name] for name in COUNTS})
    if options["baseline"] == "leave-one-out" and options["masks"] < 2:
        raise ValueError("baseline leave-one-out compares masks of one step: give at least 2 as masks, or another one")
    if options["across"] == "best" and not options["held_out"]:
        raise ValueError("across: best is decided on held-out text: give a held_out above 0, or block or model")
    at_least(0, floor=options["floor"], held_out=options["held_out"])
    if not (options["floor"] < 0.5 and options["held_out"] < 1):
        raise ValueError(f"floor is {options['floor']} (below 0.5), held_out {options['held_out']} (below 1)")
    for name in ("learning_rate", "sharpness"):
        if options[name] is not None and not 0 < options[name] < math.inf:
            raise ValueError(f"{name} is {options[name]}; it must be above 0")


policy_gradient.check = check  # type: ignore[attr-defined]  # what can be said before anything runs


def _kinds(units: list[str] | str) -> list[str]:
    return UNITS.get(units, [units]) if isinstance(units, str) else units


def _fine(kinds: list[str]) -> bool:
    return set(kinds) <= {"heads", "channels"}


def _initial(kinds: list[str]) -> str:
    return "wanda-sp" if _fine(kinds) else "layer-perplexity"


def _texts(tokens: Tensor, length: int, held_out: float) -> tuple[Tensor, Tensor]:
    """The calibration text cut to `length`: what is learned from, and what is held out, evenly spread."""
    if tokens.shape[1] < length:
        raise ValueError(
            f"length is {length}, but the calibration has sequences of {tokens.shape[1]} tokens; give at most that"
        )
    cut = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    number = min(round(held_out * len(cut)), TESTING)
    if number >= len(cut):
        raise ValueError(f"{len(cut)} sequences cannot be learned from with {number} held out; give more samples")
    testing = [len(cut) * (index + 1) // number - 1 for index in range(number)]
    learning = sorted(set(range(len(cut))) - set(testing))
    return cut[learning], cut[testing]
