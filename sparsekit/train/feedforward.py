"""SparseLLM's alternation (Eq. 4 to 13): a feed-forward part is pruned as a whole, through auxiliary variables."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.maths import ACTIVATIONS, Pattern, Stats, best_gate, best_up, home_of_double, pull, total
from sparsekit.system import ActivationStore

_TERMS = ("gate", "up", "hidden", "down")  # of the objective
_ENOUGH = 4  # tokens for each input of `down`; with 2 settling made held-out error worse


@dataclass(frozen=True)
class FeedForward:
    """The dense weights of down(phi(gate x + b) * (up x + b)), or of down(phi(gate x + b)) where there is no up.

    activation: a name in ACTIVATIONS
    gate: (inner, hidden); in a plain feed-forward part its first linear, fc1
    down: (out, inner); its bias changes nothing here
    """

    activation: str
    gate: Tensor
    down: Tensor
    up: Tensor | None = None
    gate_bias: Tensor | float = 0.0
    up_bias: Tensor | float = 0.0

    @property
    def weights(self) -> dict[str, Tensor]:
        """gate, up where there is one, down."""
        return {"gate": self.gate} | ({} if self.up is None else {"up": self.up}) | {"down": self.down}

    def branches(self, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """gate x + b and up x + b for tokens x, with other weights in place of the dense ones."""
        up = None if self.up is None else x @ weights["up"].t() + self.up_bias
        return x @ weights["gate"].t() + self.gate_bias, up

    def hidden(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """phi(gate) * up."""
        value = ACTIVATIONS[self.activation](gate)[0]
        return value if up is None else value * up


@dataclass
class Found:
    """Sparse weights by their role (gate, up, down), and what was seen on the way.

    epoch: the one that is kept; 0 is the solver applied to every linear by itself
    errors: relative squared error of the part's output with each epoch's sparse weights alone
    objectives: after the updates of p, of z and of s in each epoch, in that order; it never rises
    """

    weights: dict[str, Tensor]
    epoch: int
    errors: list[float]
    objectives: list[float]


@torch.no_grad()
def prune_jointly(
    part: FeedForward,
    inputs: Iterable[Tensor],
    store: ActivationStore,
    solver: Callable[..., Tensor],
    patterns: Mapping[str, Pattern],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    relative: bool = True,
    epochs: int = 4,
    damping: float = 0.01,
    settle: bool | None = None,
    last: bool = False,
    add_up: Callable[[list[Tensor]], object] = lambda sums: None,
) -> Found:
    """Prune a feed-forward part as a whole by alternating minimisation (SparseLLM, Eq. 4 to 13) of

        alpha ||s - gate x||^2 + alpha ||z - up x||^2 + gamma ||p - phi(s) z||^2 + beta ||y - down p||^2

    over sparse weights and, for every token, s, z and p, which start from their dense values; y is the dense output.
    Each epoch prunes the weights towards s, z and y, then updates p, z and s, each to its global minimum. A new weight
    that fits its target less well than the old one is not taken. The epoch of the lowest output error is kept.

    A solver minimises ||V x - W x||^2; a target t = s, z or y takes the place of W x by W = argmin ||W x - t||^2 +
    ridge ||W - dense||^2, which is the paper's pseudo-inverse with a ridge: the same problem up to a constant.

    inputs: chunks of tokens (..., hidden). store: an empty one; it keeps x, y, s and z of all tokens.
    solver: (weight, stats, pattern) -> weight. patterns: by role.
    relative: each penalty is divided by the dense energy of what it is about, so that 1 weighs them alike
    damping: the ridge, in units of the mean diagonal of the Gram
    settle: in every epoch `down` is pruned once more, for what the sparse gate and up really give it; not in the paper.
        It fits the calibration tokens so well that few of them mislead it: None means with 4 tokens or more for each
        input of `down`.
    last: take every new weight, and the last epoch's, as published, whatever that does to the error
    add_up: adds up sums in place over processes that saw different tokens

    Cost of an epoch: the solver for each linear (`down` twice), four products of all tokens with each weight, one or
    two Grams of the hidden activations, and the minimisers of s, one or two microseconds an entry for smooth functions.
    """
    stats, dense_hidden, energy = _begin(part, inputs, store, add_up)
    settle = epochs > 0 and (stats.count >= _ENOUGH * len(part.gate) if settle is None else settle)
    scale = energy if relative else dict.fromkeys(energy, 1.0)
    price = {key: value / (scale[key] or 1.0) for key, value in zip(_TERMS, (alpha, alpha, gamma, beta), strict=True)}
    dense = part.weights
    weights = {
        role: solver(weight, dense_hidden if role == "down" else stats, patterns[role])
        for role, weight in dense.items()
    }
    del dense_hidden
    best, errors, objectives = Found(weights, 0, [], []), [], []
    for epoch in range(epochs + 1):
        seen = _epoch(part, weights, store, price, epoch < epochs, settle, add_up)
        down, gain = weights["down"], 0.0
        if settle:
            fit = Fit(seen.given, seen.missed, damping)
            down, gain = fit.better(dense["down"], down, solver, patterns["down"], last)
        errors.append((seen.error - gain) / (energy["down"] or 1.0))
        objectives += seen.objectives
        if last or errors[-1] <= min(errors):
            best = Found(weights | {"down": down}, epoch, errors, objectives)
        if epoch < epochs:
            weights = {
                role: Fit(seen.hidden if role == "down" else stats, seen.residual[role], damping).better(
                    dense[role], weights[role], solver, patterns[role], last
                )[0]
                for role in dense
            }
    return best


@dataclass
class Fit:
    """Inputs x of a linear, and how far its current weight is from its target t.

    residual: sum (t - current x) x' (out, in)
    """

    stats: Stats
    residual: Tensor
    damping: float

    def target(self, dense: Tensor, current: Tensor) -> Tensor:
        """argmin over W of ||W x - t||^2 + ridge ||W - dense||^2."""
        lower, ridge = self.stats.cached(("feedforward", self.damping), self._factor)
        return current + torch.cholesky_solve((self.residual + ridge * (dense - current)).t(), lower).t()

    def gain(self, current: Tensor, new: Tensor) -> float:
        """By how much `new` lowers ||W x - t||^2."""
        change = new - current
        return float(total(change * (2 * self.residual - change @ self.stats.gram)))

    def better(
        self, dense: Tensor, current: Tensor, solver: Callable[..., Tensor], pattern: Pattern, always: bool = False
    ) -> tuple[Tensor, float]:
        """The solver's answer for the target, or `current` if that fits better (unless always); what was gained."""
        new = solver(self.target(dense, current).contiguous(), self.stats, pattern)
        gain = self.gain(current, new)
        return (new, gain) if always or gain > 0 else (current, 0.0)

    def _factor(self) -> tuple[Tensor, Tensor]:
        gram = self.stats.gram.clone()
        mean = gram.diagonal().mean()
        ridge = self.damping * mean + torch.finfo(gram.dtype).eps * len(gram) * mean + torch.finfo(gram.dtype).tiny
        gram.diagonal().add_(ridge)
        return torch.linalg.cholesky(gram), ridge


def _begin(
    part: FeedForward, inputs: Iterable[Tensor], store: ActivationStore, add_up: Callable[[list[Tensor]], object]
) -> tuple[Stats, Stats, dict[str, float]]:
    """Fill the store with the dense values; statistics of what enters the part and `down`, energies of the terms."""
    inner, width = part.gate.shape
    stats, hidden = (Stats(size, part.gate.device, part.gate.dtype) for size in (width, inner))
    energy = torch.zeros(len(_TERMS), dtype=torch.float64, device=home_of_double(part.gate.device))
    for chunk in inputs:
        x = chunk.reshape(-1, width).to(part.gate)
        s, z = part.branches(part.weights, x)
        p = part.hidden(s, z)
        y = p @ part.down.t()
        stats.add(x)
        hidden.add(p)
        energy += torch.stack([_square(value) for value in (s, p.new_zeros(1) if z is None else z, p, y)])
        store.append(torch.cat([x, y, s] if z is None else [x, y, s, z], 1))
    add_up([*stats.parts(), *hidden.parts(), energy])
    return stats, hidden, dict(zip(_TERMS, energy.tolist(), strict=True))


class _Seen:
    """What one pass over the tokens adds up."""

    def __init__(self, part: FeedForward, weights: Mapping[str, Tensor]):
        device = part.gate.device
        # of p, and of what the sparse gate and up give
        self.hidden, self.given = (Stats(len(part.gate), device, part.gate.dtype) for _ in range(2))
        self.residual = {role: torch.zeros_like(weight) for role, weight in weights.items()}
        self.missed = torch.zeros_like(part.down)  # residual of `down` where it is given `given`
        self.sums = torch.zeros(4, dtype=torch.float64, device=home_of_double(device))

    @property
    def error(self) -> float:
        return float(self.sums[0])

    @property
    def objectives(self) -> list[float]:
        return self.sums[1:].tolist() if self.hidden.count else []

    def parts(self) -> list[Tensor]:
        return [*self.hidden.parts(), *self.given.parts(), *self.residual.values(), self.missed, self.sums]


def _epoch(
    part: FeedForward,
    weights: Mapping[str, Tensor],
    store: ActivationStore,
    price: Mapping[str, float],
    update: bool,
    settle: bool,
    add_up: Callable[[list[Tensor]], object],
) -> _Seen:
    """Measure the sparse weights, and, if asked for, update p, z and s in the store."""
    seen, down = _Seen(part, weights), weights["down"]
    back = pull(down, beta=price["down"], gamma=price["hidden"])
    edges = [part.gate.shape[1], part.gate.shape[1] + len(down), part.gate.shape[1] + len(down) + len(part.gate)]
    for index, chunk in enumerate(store):
        x, y, s, z = chunk.to(part.gate).tensor_split(edges, 1)  # z has no columns where there is no up
        gate, up = part.branches(weights, x)
        given = part.hidden(gate, up)
        missed = y - given @ down.t()
        seen.sums[0] += _square(missed)
        if settle:
            seen.given.add(given)
            seen.missed.addmm_(missed.t(), given)
        if not update:
            continue
        value = ACTIVATIONS[part.activation](s)[0]
        free = value if up is None else value * z  # phi(s) z
        p = free + (y - free @ down.t()) @ back
        rest = y - p @ down.t()
        fixed = price["down"] * _square(rest)  # the other terms, which the updates of z and s change, follow
        costs = [price["gate"] * _square(s - gate), 0.0 if up is None else price["up"] * _square(z - up)]
        seen.sums[1] += fixed + sum(costs) + price["hidden"] * _square(p - free)
        if up is not None:
            z = best_up(up, p, value, alpha=price["up"], gamma=price["hidden"])
            free, costs[1] = value * z, price["up"] * _square(z - up)
            seen.residual["up"].addmm_((z - up).t(), x)
        seen.sums[2] += fixed + sum(costs) + price["hidden"] * _square(p - free)
        factor = 1.0 if up is None else z
        s = best_gate(part.activation, gate, p, factor, alpha=price["gate"], gamma=price["hidden"])
        free, costs[0] = ACTIVATIONS[part.activation](s)[0] * factor, price["gate"] * _square(s - gate)
        seen.sums[3] += fixed + sum(costs) + price["hidden"] * _square(p - free)
        seen.residual["gate"].addmm_((s - gate).t(), x)
        seen.residual["down"].addmm_(rest.t(), p)
        seen.hidden.add(p)
        store[index] = torch.cat([x, y, s, z], 1)
    add_up(seen.parts())
    return seen


def _square(x: Tensor) -> Tensor:
    return total(x.square())
