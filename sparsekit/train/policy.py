"""Policy-gradient mask learning as a Lightning module: probabilities of units, moved by losses of forward passes."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sparsekit.measure import losses
from sparsekit.model import Block, features
from sparsekit.model.structure import Units, choose, masking
from sparsekit.system import Team
from sparsekit.train import bernoulli
from sparsekit.train.bernoulli import Budget, Groups
from sparsekit.train.features import feature_distance
from sparsekit.train.schedule import cosine

SCALINGS = {"natural": 1.0, "sqrt": 0.5, "none": 0.0}  # power of s (1 - s) that multiplies the gradient
FIRST, STEP = 0.05, 0.05  # progressive: the share that is removed at first, and by how much it grows
LOOKS = 4  # times that the way is looked at on held-out text, the end included
# of what was seen, in float64 on the CPU, since not every device has that: in the checkpoint beside the probabilities
SEEN = ("start", "average", "spread", "best", "best_loss", "lost", "looks")
MEMORY = 0.95  # of the running variance of what the baseline leaves


class PolicyGradient(LightningModule):
    """Learns which units to keep. `scores` (units,) are there once the last step is done.

    model, blocks, units: what is pruned; the model's weights are not touched and not part of the checkpoint
    text, testing: token sequences (sequences, length), or images (images, channels, height, width), to learn from, and
        to choose between start, way and end (may be empty: the end is taken)
    score: gives the scores (units,) that the probabilities start from; None: at random
    options: as in the stage `policy_gradient`
    """

    start: Tensor  # scores (units,) that it started from
    average: Tensor  # of losses
    spread: Tensor  # running mean of squared advantages
    best: Tensor  # the scores (units,) that were best on held-out text, and their loss
    best_loss: Tensor
    looks: Tensor  # held-out losses
    lost: Tensor  # steps in which no mask had a finite loss

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        units: Units,
        text: Tensor,
        testing: Tensor,
        *,
        score: Callable[[], Tensor] | None,
        remove: float,
        steps: int,
        masks: int,
        batch: int,
        learning_rate: float,
        shape: str = "free",
        budgets: str = "separate",
        projection: str = "sigmoid-norm",
        across: str = "block",
        sharpness: float = 1.0,
        group: int = 1,
        baseline: str = "moving-average",
        window: int = 5,
        antithetic: bool = False,
        scaling: str = "none",
        normalize: bool = False,
        floor: float = 0.0,
        progressive: bool = False,
        seed: int = 0,
        team: Team = Team(),  # noqa: B008 (frozen)
        say: Callable[[str], Any] = print,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.outside = (model, list(blocks))  # in a tuple, so that they are no submodules
        self.units, self.text, self.testing, self.score = units, text, testing, score
        self.remove, self.steps, self.draws, self.batch, self.peak = remove, steps, masks, batch, learning_rate
        self.choice: dict[str, Any] = {"shape": shape, "budgets": budgets}
        self.projection, self.across, self.sharpness, self.group = projection, across, sharpness, group
        self.baseline, self.window, self.antithetic = baseline, window, antithetic
        self.scaling, self.normalize, self.floor, self.progressive = SCALINGS[scaling], normalize, floor, progressive
        self.seed, self.team, self.say, self.rate = seed, team, say, cosine(steps)
        count = Groups.by_score(units, torch.zeros(len(units)), group).count
        self.probabilities = nn.Parameter(torch.zeros(count))
        self.start = torch.zeros(len(units), dtype=torch.float64)
        self.average = torch.tensor(math.nan, dtype=torch.float64)
        self.spread = torch.zeros((), dtype=torch.float64)
        self.best = torch.zeros(len(units), dtype=torch.float64)
        self.best_loss = torch.tensor(math.inf, dtype=torch.float64)
        self.lost = torch.zeros((), dtype=torch.long)
        self.looks = torch.full((LOOKS + 1,), math.nan, dtype=torch.float64)
        self.curve: list[list[float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as published."""
        return torch.optim.SGD([self.probabilities], lr=self.peak)

    def on_train_start(self) -> None:
        """Put the model on the device, find the start unless a checkpoint brought it, say what it will take."""
        model, _ = self.outside
        scores = self.start
        if self.global_step == 0:
            scores = self.score().double().cpu() if self.score else self._at_random()
            self.start.copy_(scores)
        model.to(self.device)
        self.groups = Groups.by_score(self.units, scores, self.group)
        self.keep_at_start = choose(self.units, scores, self.remove, **self.choice)
        shape, joint = self.choice["shape"], self.choice["budgets"] == "joint"
        self.allowed = bernoulli.budgets(self.units, self.groups, self.keep_at_start, shape, joint)
        if self.global_step == 0:
            self._begin()
        for point in self.curve:  # of the run that is gone on with: loggers begin anew
            self._log(point)
        started = time.perf_counter()
        self._loss(self._tokens(0), torch.ones(len(self.units), dtype=torch.bool))
        self.forward_seconds = time.perf_counter() - started
        passes = self.draws + (self.baseline == "initial")
        ahead = self.steps - self.global_step
        left = ahead * passes * self.forward_seconds
        self.say(
            f"policy gradient: {ahead} steps of {passes} forward passes over {self.batch} "
            f"{'images' if self.text.is_floating_point() else f'x {self.text.shape[1]} tokens'} for "
            f"{len(self.probabilities):,} probabilities, about {left / 60:.0f} min"
        )
        self.began, self.first = time.perf_counter(), self.global_step

    def _at_random(self) -> Tensor:
        return torch.rand(len(self.units), generator=torch.Generator().manual_seed(self.seed)).double()

    @torch.no_grad()
    def _begin(self) -> None:
        """The first probabilities: of the ways from scores to them, the one whose mask is best on held-out text."""
        best, least = None, math.inf
        for values in self._starts():
            self.probabilities.copy_(self._project(values, 0))
            self._look(0)
            if best is None or float(self.best_loss) < least:
                best, least = self.probabilities.clone(), float(self.best_loss)
        assert best is not None
        self.probabilities.copy_(best)

    def _starts(self) -> Iterator[Tensor]:
        if self.score is None:  # every unit alike, the way with the most to learn
            values = torch.empty(self.groups.count, dtype=torch.float64)
            for budget in self.allowed:
                values[budget.members] = self._limit(budget, 0)
            yield values
        elif self.projection == "score-const":
            yield bernoulli.score_const(self.groups, self.keep_at_start)
        else:
            ways = ("block", "model") if self.across == "best" else (self.across,)
            if all(part.count == 1 for part in self.units.parts):
                ways = ("model",)  # alone in its block, every unit would be like any other
            for across in ways:
                yield bernoulli.sigmoid_norm(
                    self.units,
                    self.groups,
                    self.start,
                    self.allowed,
                    across=across,
                    sharpness=self.sharpness,
                    ranks=self.projection == "sigmoid-rank",
                )

    def _limit(self, budget: Budget, step: int) -> float:
        """The share that a budget keeps at a step; progressive: it falls from 95 % on."""
        if not self.progressive:
            return budget.limit
        phases = max(1, math.ceil((self.remove - FIRST) / STEP - 1e-9) + 1)
        phase = min(phases - 1, step * phases // self.steps)
        removed = min(self.remove, FIRST + STEP * phase)
        return 1 - (1 - budget.limit) * removed / self.remove

    def _project(self, values: Tensor, step: int) -> Tensor:
        for budget in self.allowed:
            values = budget.project(values, self.floor, 1 - self.floor, limit=self._limit(budget, step))
        return values

    def _tokens(self, step: int) -> Tensor:
        """The sequences of a step (batch, length): all once in an order of their own, then all again."""
        count = len(self.text)
        chosen = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + position // count))
            chosen.append(order[position % count])
        return self.text[torch.stack(chosen)]

    @torch.no_grad()
    def _losses(self, tokens: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """The mean loss under each of some masks (units,), float64.

        That is the cross-entropy (nats) of the next token, of images the distance of features to the whole model's.

        Pairs of a mask and a sequence are dealt out to the processes in turn, so that each has equally many.
        """
        _, blocks = self.outside
        sums = torch.zeros(len(masks), dtype=torch.float64)
        for number, kept in enumerate(masks):
            first = (self.team.rank - number * len(tokens)) % self.team.size
            mine = tokens[first :: self.team.size]
            if len(mine):
                measure = self._measure(mine)  # of images, by what the whole model makes of them
                with masking(blocks, self.units) as mask:
                    mask(kept)
                    sums[number] = measure()
        self.team.sum([sums])
        return sums / len(tokens)

    def _measure(self, mine: Tensor) -> Callable[[], float]:
        """A function that gives the summed loss of the model, as it runs when it is called."""
        model, _ = self.outside
        if not mine.is_floating_point():
            return lambda: float(losses(model, mine, batch=len(mine)).sum())
        pixels = mine.to(self.device, next(model.parameters()).dtype)
        whole = features(model, pixels)[1]
        return lambda: float(feature_distance(features(model, pixels)[1], whole).flatten(1).mean(1).sum())

    def _loss(self, tokens: Tensor, kept: Tensor) -> float:
        return float(self._losses(tokens, [kept]))

    def training_step(self, batch: Tensor, index: int) -> None:
        """Draw masks, measure them, move the probabilities, project them."""
        step = self.global_step
        tokens = self._tokens(step)
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        masks = bernoulli.sample(self.probabilities, self.draws, generator, self.antithetic)  # (draws, groups)
        seen = self._losses(tokens, [each[self.groups.number] > 0 for each in masks])
        advantages = self._advantages(seen, tokens).to(self.probabilities)
        loss = bernoulli.surrogate(self.probabilities, masks.to(self.probabilities), advantages)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        s = self.probabilities.detach()
        assert self.probabilities.grad is not None
        self.probabilities.grad *= (s * (1 - s)) ** self.scaling
        for settings in optimizer.param_groups:  # type: ignore[union-attr]
            settings["lr"] = self.peak * self.rate(step)
        optimizer.step()  # type: ignore[union-attr]
        with torch.no_grad():
            self.probabilities.copy_(self._project(self.probabilities.detach().cpu(), step))
        entropy = float(torch.special.entr(s).add(torch.special.entr(1 - s)).mean())
        self.curve.append([step, float(seen.mean()), entropy])
        self._log(self.curve[-1])
        if (step + 1) * LOOKS // self.steps > step * LOOKS // self.steps:
            self._look((step + 1) * LOOKS // self.steps)

    def _advantages(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """The losses `seen` (draws,) less the baseline; a mask whose loss is not finite says nothing."""
        if self.baseline == "initial":
            seen = seen - self._loss(tokens, self.keep_at_start)
        known = seen[seen.isfinite()]
        if not len(known):
            self.lost.add_(1)
            return torch.zeros_like(seen)
        left = seen - self._baseline(seen, known)
        left = left.where(left.isfinite(), 0.0)
        if self.normalize:
            self.spread.mul_(MEMORY).add_((1 - MEMORY) * float(left.square().sum() / len(known)))
            weight = 1 - MEMORY ** (self.global_step + 1)
            left = left / max(math.sqrt(float(self.spread) / weight), 1e-12)
        # the mean is over masks that say something; the published code divides by one less (Eq. 7 does not)
        count = max(1, len(known) - 1) if self.baseline == "published" else len(known)
        return left * len(seen) / count

    def _baseline(self, seen: Tensor, known: Tensor) -> Tensor:
        """What is subtracted from each loss (draws,); NaN where nothing is known yet that is independent of it."""
        before = self.average.clone()
        if self.baseline == "none":
            return torch.zeros_like(seen)
        now, old = known.mean(), (torch.zeros(()) if self.baseline == "published" else known.mean())
        old = old.to(known) if torch.isnan(before) else before
        self.average.copy_(old + (now - old) / self.window)
        if self.baseline == "published":  # Eq. 8, from 0, with the step's own losses in it
            return self.average.expand_as(seen)
        if self.baseline == "leave-one-out":
            others = bernoulli.leave_one_out(seen, self.antithetic)
            return others.where(others.isfinite(), before)  # a single pair has no others: what was before
        return before.expand_as(seen)

    def _log(self, point: list[float]) -> None:
        step, loss, entropy = point
        for logger in self.trainer.loggers:
            logger.log_metrics({"loss": loss, "entropy": entropy}, step=int(step))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The curve so far, beside the probabilities and what was looked at."""
        checkpoint["curve"] = self.curve
        checkpoint["seen"] = {name: getattr(self, name) for name in SEEN}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The curve of the run that was left."""
        self.curve = checkpoint["curve"]
        for name, value in checkpoint["seen"].items():
            setattr(self, name, value)

    def by_units(self) -> Tensor:
        """The probabilities as scores (units,); units of a group are told apart by what they started from."""
        order = torch.empty(len(self.units), dtype=torch.float64)
        order[self.start.argsort(stable=True)] = torch.arange(len(self.units), dtype=torch.float64)
        return self.probabilities.detach().cpu().double()[self.groups.number] + 1e-6 * order / len(self.units)

    def _look(self, number: int) -> None:
        """Compare the mask that would be chosen now with the best one so far, on held-out text."""
        if not len(self.testing):
            return
        scores = self.by_units()
        kept = choose(self.units, scores, self.remove, **self.choice)
        parts = self.testing.split(max(1, self.batch))
        loss = sum(self._loss(part, kept) * len(part) for part in parts) / len(self.testing)
        if math.isfinite(loss):
            self.looks[number] = min(loss, float(self.looks[number].nan_to_num(math.inf)))
        if loss < self.best_loss or not (number or self.best_loss.isfinite()):
            self.best_loss.fill_(loss if math.isfinite(loss) else math.inf)
            self.best.copy_(scores)

    @property
    def scores(self) -> Tensor:
        """What was learned, as scores (units,): the best on held-out text, where there is some."""
        return self.best if len(self.testing) else self.by_units()

    @property
    def notes(self) -> dict[str, Any]:
        """For the report."""
        seconds = time.perf_counter() - self.began
        done = max(1, self.global_step - self.first)
        return {
            "steps": self.steps,
            "probabilities": len(self.probabilities),
            "seconds_of_a_step": round(seconds / done, 4),
            "seconds_of_a_forward_pass": round(self.forward_seconds, 4),
            **({"steps_without_a_finite_loss": int(self.lost)} if self.lost else {}),
            "held_out": [None if math.isnan(loss) else round(loss, 5) for loss in self.looks.tolist()],
            "curve": [point[:2] for point in self.curve[:: max(1, len(self.curve) // 200)]],
        }

    def on_train_end(self) -> None:
        """The model computes on the CPU again; also where a resumed run had no step left to take."""
        self.outside[0].to("cpu")
        if lost := int(self.lost):
            left = "the units with the best initial scores stay" if lost == self.steps else "they taught nothing"
            self.say(f"warning: in {lost} of {self.steps} steps no mask had a loss that is a number; {left}")
