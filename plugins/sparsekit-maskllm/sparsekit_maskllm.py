"""MaskLLM: the n:m mask of all linears at once, learned as a choice among the candidate masks of every group."""

import math
from collections.abc import Mapping
from itertools import combinations
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from lightning.pytorch import LightningModule
from sparsekit.contracts import Context, Count, Effect, Fit, Fraction, NotNegative, Positive, declares
from sparsekit.maths import NM
from sparsekit.recipe import SolverChain
from sparsekit.train import Checkpoints
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

SPREAD = 0.01  # of the logits before the prior


@declares(Effect(prunes=True, start="dense", gradients=True))
def maskllm(
    context: Context,
    *,
    prior: SolverChain | None = "sparsegpt",
    strength: NotNegative = 3.0,
    steps: Count = 200,
    batch: Count = 4,
    learning_rate: Positive = 0.3,
    temperature: Annotated[list[float], "from, to"] = [4.0, 0.05],  # noqa: B006 (never changed)
    scale: Annotated[list[float], "from, to"] = [100.0, 500.0],  # noqa: B006
    regularization: NotNegative = 0.01,
    estimator: Literal["gumbel", "policy"] = "gumbel",
    draws: Annotated[int, Gt(1)] = 4,
    held_out: Fraction = 0.125,
) -> Fit:
    """Learn which n of m weights of every group stay, from the loss of the masked model; kept weights do not change.

    Each group has a logit for each of its C(m, n) candidate masks. gumbel, as published: the mask of a step is the
    softmax of (scale logits + Gumbel noise) / temperature over the candidates, differentiable (Eq. 5 to 8). policy:
    forward passes alone; `draws` masks are drawn in a step, and the logits move along the score-function estimate with
    the mean loss of the other draws as baseline. At the end the candidate of the largest logit stays.

    prior: solvers whose mask the logits start from (Eq. 10), null for none; strength: of it, in deviations of logits
    steps, batch, learning_rate (its peak, AdamW, falling to 0): of training, in sequences of the calibration text
    temperature, scale: from the first to the last step, linearly
    regularization: of the kept weights' squares as a share of all; Eq. 9 has their sum, which outgrows the loss
    draws: masks in a step of policy
    held_out: share of the sequences on which the learned mask must be better than the one it started from, which is
        kept otherwise; 0, as published: what was learned is taken

    Source: Fang et al. 2024, MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, arXiv:2409.17481;
    policy after MaskPro, arXiv:2506.12876, with all candidates in place of its probabilities of single weights.
    The paper has 2,000 steps of 256 sequences of 4,096 tokens and a rate of 1e-4.
    Memory: C(m, n) / m numbers for each weight, and AdamW's two moments of them: 18 bytes a weight at 2:4. Raises
    ValueError for patterns that are not n:m.
    """
    patterns = list(context.patterns.values())
    if not all(isinstance(pattern, NM) and not pattern.pairs for pattern in patterns):
        raise ValueError(f"maskllm chooses among masks of groups; {patterns[0]} has none: give n:m, such as 2:4")
    kept = _prior(context, prior) if prior is not None else {}
    number = min(math.ceil(held_out * len(context.tokens)), len(context.tokens) - 1)
    asked = SimpleNamespace(strength=strength, steps=steps, batch=batch, peak=learning_rate, temperature=temperature)
    asked.scale, asked.regularization, asked.draws = scale, regularization, draws if estimator == "policy" else 0
    module = MaskLLM(context.with_tokens(context.tokens[number:]), context.tokens[:number], kept, asked)
    data: Any = DataLoader(range(steps))  # type: ignore[arg-type]  # which text a step sees follows from its number
    return Fit(module, data, [Checkpoints(context.checkpoints)])


def _check(options: Mapping[str, Any]) -> None:
    for name in ("temperature", "scale"):
        value = options[name]
        if len(value) != 2 or not all(isinstance(each, int | float) and each > 0 for each in value):
            raise ValueError(f"{name} is {value}; give two numbers above 0, its first and its last value")


maskllm.check = _check  # type: ignore[attr-defined]  # what options mean together


@torch.no_grad()
def _prior(context: Context, solver: Any) -> dict[str, Tensor]:
    """A linear's name -> the weights (out, in) that the solver would keep in the dense model."""
    solve, stream, kept = context.solver(solver), context.through(), {}
    for block in stream:
        block.to(stream.device)
        for names, stats in stream.statistics(block):
            for name in names:
                weight = block.linears[name].weight.float().contiguous()
                kept[name] = (solve(weight, stats, context.patterns[name]) != 0).cpu()
        stream.advance(block)
        block.to("cpu")
    stream.close()
    return kept


def candidates(pattern: NM) -> Tensor:
    """The masks of a group (C(m, n), m), zeros and ones."""
    return one_hot(torch.tensor([*combinations(range(pattern.group), pattern.kept)]), pattern.group).sum(1).float()


class MaskLLM(LightningModule):
    """Logits of all groups, and the loss of the model under a mask. asked: as in `maskllm`; draws: 0 for gumbel."""

    def __init__(self, context: Context, testing: Tensor, kept: Mapping[str, Tensor], asked: SimpleNamespace):
        super().__init__()
        self.outside, self.testing, self.asked = (context,), testing, asked  # a tuple: the model is no submodule
        self.linears = {name: linear for block in context.blocks for name, linear in block.linears.items()}
        self.energy = sum(float(linear.weight.float().square().sum()) for linear in self.linears.values())
        self.choices = {name: candidates(context.patterns[name]) for name in self.linears}  # type: ignore[arg-type]
        random = torch.Generator().manual_seed(context.seed)
        self.logits = nn.ParameterList()
        for name, linear in self.linears.items():
            choices = self.choices[name]
            start = SPREAD * torch.randn(linear.weight.numel() // choices.shape[1], len(choices), generator=random)
            if name in kept:
                alike = kept[name].float().reshape(-1, choices.shape[1]) @ choices.t()  # weights in common
                start += asked.strength * SPREAD * (alike - alike.mean(1, keepdim=True))
            self.logits.append(nn.Parameter(start))
        self.first = self._best()

    def configure_optimizers(self) -> Any:
        """AdamW; its rate falls to zero along a line."""
        optimizer = torch.optim.AdamW(self.logits.parameters(), lr=self.asked.peak * SPREAD, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.asked.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_start(self) -> None:
        self.outside[0].model.to(self.device)

    def _at(self, ends: list[float], step: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * step / max(1, self.asked.steps - 1)

    def _loss(self, masks: list[Tensor], tokens: Tensor) -> Tensor:
        """The mean cross-entropy of the next token under masks (out, in), less the kept weights' squares."""
        weights, kept = {}, tokens.new_zeros((), dtype=torch.float32)
        for (name, linear), mask in zip(self.linears.items(), masks, strict=True):
            masked = linear.weight * mask.to(linear.weight)
            weights[f"{name}.weight"] = linear.stored(masked)
            if self.asked.regularization and mask.requires_grad:
                kept = kept + masked.float().square().sum()
        logits = functional_call(self.outside[0].model, weights, (tokens,), {"use_cache": False}).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss - self.asked.regularization * kept / self.energy

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """One step of the logits on a few sequences."""
        step, text = self.global_step, self.outside[0].tokens
        tokens = text[(torch.arange(self.asked.batch) + step * self.asked.batch) % len(text)].to(self.device)
        torch.manual_seed(self.outside[0].seed + step)
        if self.asked.draws:
            return self._policy(tokens, self._at(self.asked.scale, step))
        heat, scale = self._at(self.asked.temperature, step), self._at(self.asked.scale, step)
        masks = []
        for (name, linear), logits in zip(self.linears.items(), self.logits, strict=True):
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
            soft = ((scale * logits + noise) / heat).softmax(1)
            masks.append((soft @ self.choices[name].to(soft)).view(linear.shape))
        self.log("loss", loss := self._loss(masks, tokens))
        return loss

    def _policy(self, tokens: Tensor, scale: float) -> Tensor:
        """A loss whose gradient is the score-function estimate; the model runs forward only."""
        odds = [(scale * logits).log_softmax(1) for logits in self.logits]
        losses, chosen = [], []
        for _ in range(self.asked.draws):
            picks = [torch.multinomial(each.detach().exp(), 1) for each in odds]
            pairs = zip(self.linears.items(), picks, strict=True)
            masks = [self.choices[n].to(p.device)[p[:, 0]].view(linear.shape) for (n, linear), p in pairs]
            with torch.no_grad():
                losses.append(float(self._loss(masks, tokens)))
            chosen.append(picks)
        mean, total = sum(losses) / len(losses), tokens.new_zeros((), dtype=torch.float32)
        for loss, picks in zip(losses, chosen, strict=True):
            advantage = (loss - mean) * self.asked.draws / (self.asked.draws - 1)
            total = total + advantage * sum(o.gather(1, p).sum() for o, p in zip(odds, picks, strict=True))
        self.log("loss", mean)
        return total / self.asked.draws

    @torch.no_grad()
    def _best(self) -> dict[str, Tensor]:
        """The likeliest candidate of every group: masks (out, in) by linear, bool."""
        pairs = zip(self.linears.items(), self.logits, strict=True)
        return {n: self.choices[n][each.cpu().argmax(1)].view(linear.shape).bool() for (n, linear), each in pairs}

    @torch.no_grad()
    def on_train_end(self) -> None:
        """What was learned is the mask, or what it started from where that is better on held-out text."""
        context, best = self.outside[0], self._best()
        notes = context.notes["maskllm"] = {"steps": self.asked.steps, "groups": sum(len(each) for each in self.logits)}
        if len(self.testing):
            kept = [[masks[name].float().to(self.device) for name in self.linears] for masks in (self.first, best)]
            start, learned = (sum(float(self._loss(k, t[None].to(self.device))) for t in self.testing) for k in kept)
            notes["held_out"] = {"start": start / len(self.testing), "learned": learned / len(self.testing)}
            best = best if learned < start else self.first
        context.model.to("cpu")
        for block in context.blocks:
            block.masks = {name: best[name] for name in block.linears}
