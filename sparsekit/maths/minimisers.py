"""The global minimisers of SparseLLM's subproblems (Eq. 6 to 13): activations, outputs and gates."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PIECE = {"cpu": 2**15}  # elements whose minimisers are looked for together: on a CPU what its caches hold
_LARGE = 2**20  # elsewhere, where a piece is waited for: .2 GB for the slopes at all nodes
_LINEAR = 20.0  # beyond +-20 the smooth functions are s or 0 to float32's last digit
_FINE, _COARSE = torch.linspace(-5, 5, 41), torch.tensor([6.0, 7.5, 10.0, 14.0, _LINEAR])  # nodes, and those outside
_STEPS, _HALVINGS, _SHARE = 5, 30, 0.1  # Newton's steps in a bracket, and what is done where they do not settle


Jet = tuple[Tensor, Tensor, Tensor]  # a function's value, slope and curvature


def _relu(s: Tensor) -> Jet:
    return s.relu(), (s > 0).to(s), torch.zeros_like(s)


def _relu2(s: Tensor) -> Jet:
    positive = s.relu()
    return positive.square(), 2 * positive, 2 * (s > 0).to(s)


def _silu(s: Tensor) -> Jet:
    gate = s.sigmoid()
    rest = 1 - gate
    return s * gate, gate * (1 + s * rest), gate * rest * (2 + s * (rest - gate))


def _gelu(s: Tensor) -> Jet:
    share, density = 0.5 * (1 + torch.erf(s / math.sqrt(2))), torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)
    return s * share, share + s * density, density * (2 - s.square())


def _gelu_tanh(s: Tensor) -> Jet:
    root, square = math.sqrt(2 / math.pi), s.square()
    tanh = (root * s * (1 + 0.044715 * square)).tanh()
    inner, rest = root * (1 + 0.134145 * square), 1 - tanh.square()  # inner: slope of what tanh is taken of
    curvature = rest * (inner + s * (root * 0.134145 * s - tanh * inner.square()))
    return 0.5 * s * (1 + tanh), 0.5 * (1 + tanh + s * rest * inner), curvature


ACTIVATIONS: dict[str, Callable[[Tensor], Jet]] = {
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


@torch.no_grad()
def best_gate(
    activation: str, start: Tensor, hidden: Tensor, factor: Tensor | float, *, alpha: float, gamma: float
) -> Tensor:
    """The global minimiser s of alpha (s - start)^2 + gamma (hidden - factor phi(s))^2, entry by entry (Eq. 7 and 13).

    relu has a closed form on either side of 0, relu2 one up to a cubic's largest root. For the smooth functions a table
    of phi brackets every local minimum, a secant method refines each, and the lowest is taken.

    Raises ValueError for an activation that is not in ACTIVATIONS.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known; it can be {', '.join(ACTIVATIONS)}")
    factor = torch.as_tensor(factor, dtype=start.dtype, device=start.device).expand_as(start)
    shape, best, piece = start.shape, [], _PIECE.get(start.device.type, _LARGE)
    for m, p, c in zip(*(x.reshape(-1).split(piece) for x in (start, hidden, factor)), strict=True):

        def objective(s: Tensor, m: Tensor = m, p: Tensor = p, c: Tensor = c) -> Tensor:
            return alpha * (s - m).square() + gamma * (p - c * ACTIVATIONS[activation](s)[0]).square()

        linear = (alpha * m + gamma * c * p) / (alpha + gamma * c.square())  # where phi(s) = s
        if activation == "relu":
            candidates = [m.clamp(max=0), linear.clamp(min=0)]
        elif activation == "relu2":
            candidates = [m.clamp(max=0), _square_branch(m, p, c, alpha, gamma)]
        else:
            candidates = [m, m.clamp(max=-_LINEAR), linear.clamp(min=_LINEAR)]
        s = candidates[0]
        least = objective(s)
        for other in candidates[1:]:
            value = objective(other)
            s, least = s.where(least <= value, other), torch.minimum(least, value)
        if activation not in ("relu", "relu2"):
            _refine(s, least, ACTIVATIONS[activation], (m, p, c), alpha, gamma)
        best.append(s)
    return torch.cat(best).view(shape)


def _square_branch(m: Tensor, p: Tensor, c: Tensor, alpha: float, gamma: float) -> Tensor:
    """The largest root of the derivative for phi(s) = s^2, s >= 0, a cubic: Newton from right of it."""
    cubic = 2 * gamma * c.square()
    linear, constant = alpha - 2 * gamma * c * p, -alpha * m
    flat = cubic <= torch.finfo(m.dtype).tiny * 1e6
    safe = cubic.where(~flat, 1)
    s = torch.maximum((-2 * linear / safe).clamp(min=0).sqrt(), (-2 * constant / safe).clamp(min=0) ** (1 / 3))
    for _ in range(24):
        slope = 3 * cubic * s.square() + linear
        s = (s - ((cubic * s.square() + linear) * s + constant) / slope.where(slope != 0, 1)).clamp(min=0)
    return s.where(~flat & s.isfinite(), m.clamp(min=0))


def _refine(
    s: Tensor, least: Tensor, jet: Callable[[Tensor], Jet], of: tuple[Tensor, ...], alpha: float, gamma: float
) -> None:
    """Put into `s` and `least` (n,) every local minimum that is lower, wherever it is between the nodes."""

    def derivatives(x: Tensor, m: Tensor, p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, curvature = jet(x)
        rest = p - c * value
        return alpha * (x - m) - gamma * c * slope * rest, alpha + gamma * c * (c * slope.square() - rest * curvature)

    nodes = torch.cat([-_COARSE.flip(0), _FINE, _COARSE]).to(s)
    value, slope, _ = jet(nodes)
    m, p, c = of
    table = torch.stack([alpha * nodes, nodes * 0 - alpha, -gamma * slope, gamma * slope * value], 1)
    falls = table @ torch.stack([torch.ones_like(m), m, c * p, c.square()]) < 0  # (nodes, n)
    cell, entry = (falls[:-1] & ~falls[1:]).nonzero(as_tuple=True)
    low, high, m, p, c = nodes[cell], nodes[cell + 1], m[entry], p[entry], c[entry]
    x = (low + high) / 2
    for _ in range(_STEPS):
        first, second = derivatives(x, m, p, c)
        before, x = x, torch.clamp(x - first / second.abs().clamp(min=alpha * _SHARE), low, high)
    late = ((x - before).abs() > 1e-5).nonzero().squeeze(1)
    if len(late):  # nearly flat, or steep on one side: halve the bracket instead
        low, high, of = low[late], high[late], (m[late], p[late], c[late])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            left = derivatives(middle, *of)[0] < 0
            low, high = middle.where(left, low), high.where(left, middle)
        x[late] = (low + high) / 2
    found = alpha * (x - m).square() + gamma * (p - c * jet(x)[0]).square()
    least.scatter_reduce_(0, entry, found, "amin")
    won = found <= least[entry]
    s[entry[won]] = x[won]


@torch.no_grad()
def best_up(start: Tensor, hidden: Tensor, gate: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """argmin over z of alpha (z - start)^2 + gamma (hidden - gate z)^2, entry by entry (Eq. 12, any alpha and gamma).

    gate: phi(s), what the gate's branch gives.
    """
    return (alpha * start + gamma * gate * hidden) / (alpha + gamma * gate.square())


@torch.no_grad()
def best_hidden(given: Tensor, output: Tensor, down: Tensor, *, beta: float, gamma: float) -> Tensor:
    """argmin over p of beta ||y - down p||^2 + gamma ||p - given||^2 for every token (Eq. 6 and 10).

    given: phi(s) z (tokens, inner). output: y (tokens, out). down: (out, inner).
    By the push-through identity p = given + beta down' (gamma I + beta down down')^-1 (y - down given): the matrix to
    factor is (out, out), not (inner, inner), and what is added is small.
    """
    return given + (output - given @ down.t()) @ pull(down, beta, gamma)


def pull(down: Tensor, beta: float, gamma: float) -> Tensor:
    """beta (gamma I + beta down down')^-1 down, (out, inner): takes an output's error to the hidden activations."""
    inner = beta * down @ down.t()
    inner.diagonal().add_(gamma)
    return torch.cholesky_solve(beta * down, torch.linalg.cholesky(inner))
