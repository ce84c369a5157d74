"""SparseLLM's subproblems against brute force and torch.linalg, and what the alternation promises."""

import pytest
import torch

from sparsekit.maths import ACTIVATIONS, NM, Stats, Unstructured, best_gate, best_up
from sparsekit.maths.minimisers import best_hidden
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.system import ActivationStore
from sparsekit.train import FeedForward, prune_jointly
from sparsekit.train.feedforward import Fit

F64 = torch.float64
PENALTIES = [(1.0, 1.0), (0.1, 10.0), (5.0, 0.2), (1.0, 100.0)]
REFERENCE = {
    "relu": torch.relu,
    "relu2": lambda s: torch.relu(s) ** 2,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda s: torch.nn.functional.gelu(s, approximate="tanh"),
}


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_their_value_slope_and_curvature(name):
    s = torch.linspace(-9, 9, 400, dtype=F64, requires_grad=True)
    value = REFERENCE[name](s)
    (slope,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    curvature = torch.autograd.grad(slope.sum(), s)[0] if slope.requires_grad else torch.zeros_like(s)
    for got, wanted in zip(ACTIVATIONS[name](s.detach()), (value, slope, curvature), strict=True):
        torch.testing.assert_close(got, wanted.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [0.3, 1, 30])
@pytest.mark.parametrize(("alpha", "gamma"), PENALTIES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate_is_the_global_minimum(name, alpha, gamma, size):
    """No point of a fine grid is lower: neither near the start, nor where the function bends."""
    count = 150
    m, p, c = size * normal(count, seed=1), 2 * size * normal(count, seed=2), 3 * normal(count, seed=3)
    m[0], p[1], c[2] = 0, 0, 0

    def objective(s):
        return alpha * (s - m) ** 2 + gamma * (p - c * REFERENCE[name](s)) ** 2

    found = objective(best_gate(name, m, p, c, alpha=alpha, gamma=gamma))
    reach = (gamma / alpha) ** 0.5 * (p - c * REFERENCE[name](m)).abs()  # it cannot be further from m than that
    steps = torch.linspace(-1, 1, 4001, dtype=F64).unsqueeze(1)
    grid = torch.cat([m + steps * reach, (22 * steps).expand(-1, count), (3 * steps).expand(-1, count)])
    assert (found <= objective(grid).amin(0) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate_in_single_precision(name):
    m, p, c = normal(500, seed=1), normal(500, seed=2), 3 * normal(500, seed=3)

    def objective(s):
        return 0.5 * (s.double() - m) ** 2 + 2 * (p - c * REFERENCE[name](s.double())) ** 2

    exact = objective(best_gate(name, m, p, c, alpha=0.5, gamma=2.0))
    single = best_gate(name, m.float(), p.float(), c.float(), alpha=0.5, gamma=2.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(objective(single), exact, atol=1e-6, rtol=1e-4)


def test_relu_is_not_decided_by_the_sign_of_the_start():
    """A negative start whose hidden value is large must go up: the shorter rule of the paper would leave it."""
    found = best_gate("relu", *(torch.tensor([v], dtype=F64) for v in (-0.1, 4.0)), 1.0, alpha=1.0, gamma=1.0)
    torch.testing.assert_close(found, torch.tensor([1.95], dtype=F64))


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="it can be relu"):
        best_gate("tanh", normal(2), normal(2), 1.0, alpha=1.0, gamma=1.0)


def test_up_with_distinct_penalties():
    m, p, g = normal(50, seed=1), normal(50, seed=2), normal(50, seed=3)
    z = best_up(m, p, g, alpha=0.3, gamma=4.0).requires_grad_()
    (slope,) = torch.autograd.grad((0.3 * (z - m) ** 2 + 4 * (p - g * z) ** 2).sum(), z)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_hidden_is_the_least_squares_answer():
    given, output, down = normal(7, 12), normal(7, 5, seed=1), normal(5, 12, seed=2)
    beta, gamma = 0.7, 0.2
    stacked = torch.cat([beta**0.5 * down, gamma**0.5 * torch.eye(12, dtype=F64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([beta**0.5 * output, gamma**0.5 * given], 1).t()).solution.t()
    torch.testing.assert_close(best_hidden(given, output, down, beta=beta, gamma=gamma), wanted)


def test_a_target_becomes_a_dense_weight():
    """Distances to W x_t are those to the target itself, but for a constant and the ridge."""
    x, target, dense, current = normal(60, 8), normal(60, 5, seed=1), normal(5, 8, seed=2), normal(5, 8, seed=3)
    stats = Stats.of(x)
    fit = Fit(stats, (target - x @ current.t()).t() @ x, 0.5)
    ridge = 0.5 * stats.gram.diagonal().mean()
    stacked = torch.cat([x, ridge.sqrt() * torch.eye(8, dtype=F64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([target, ridge.sqrt() * dense.t()])).solution.t()
    torch.testing.assert_close(fit.target(dense, current), wanted)
    other = normal(5, 8, seed=4)
    before, after = ((target - x @ weight.t()).square().sum() for weight in (current, other))
    assert fit.gain(current, other) == pytest.approx(float(before - after))


def part(name, gated, dtype=F64, hidden=12, inner=24, seed=0):
    return FeedForward(
        name,
        normal(inner, hidden, seed=seed, dtype=dtype),
        normal(hidden, inner, seed=seed + 1, dtype=dtype),
        normal(inner, hidden, seed=seed + 2, dtype=dtype) if gated else None,
        normal(inner, seed=seed + 3, dtype=dtype),
        normal(inner, seed=seed + 4, dtype=dtype) if gated else 0.0,
    )


def solve(ffn, pattern, solver=sparsegpt, budget=10**9, **options):
    inputs = normal(3, 2, 40, 12, seed=9, dtype=ffn.gate.dtype)
    store = ActivationStore(budget)
    found = prune_jointly(ffn, inputs, store, solver, dict.fromkeys(ffn.weights, pattern), **options)
    store.close()
    return found, inputs.reshape(-1, 12)


def output(ffn, weights, x):
    return ffn.hidden(*ffn.branches(weights, x)) @ weights["down"].t()


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize(("name", "gated"), [(name, gated) for name in ACTIVATIONS for gated in (True, False)])
def test_the_objective_never_rises_and_the_best_epoch_is_kept(name, gated, settle):
    ffn = part(name, gated)
    found, x = solve(ffn, NM(2, 4), alpha=0.7, beta=1.3, gamma=0.4, epochs=5, settle=settle)
    assert len(found.objectives) == 15 and len(found.errors) == 6
    rises = [b - a for a, b in zip(found.objectives, found.objectives[1:], strict=False)]
    assert max(rises) <= 1e-9 * found.objectives[0]
    assert found.objectives[-1] < 0.9 * found.objectives[0]
    assert found.errors[found.epoch] == min(found.errors)
    assert all(NM(2, 4).satisfied(weight) for weight in found.weights.values())
    dense = output(ffn, ffn.weights, x)
    error = (output(ffn, found.weights, x) - dense).square().sum() / dense.square().sum()
    assert float(error) == pytest.approx(min(found.errors))


def test_it_is_worth_it():
    ffn = part("silu", True)
    local = solve(ffn, Unstructured(0.7), epochs=0, settle=False)[0].errors[0]
    paper = solve(ffn, Unstructured(0.7), settle=False)[0]
    ours = solve(ffn, Unstructured(0.7))[0]
    assert min(ours.errors) < min(paper.errors) < 0.98 * local
    assert paper.errors[0] == pytest.approx(local)


def test_few_tokens_are_not_settled_for():
    """240 tokens are enough for 24 inputs of down, not for 80."""
    for inner, settled in ((24, True), (80, False)):
        ffn = part("silu", True, inner=inner)
        errors = [solve(ffn, NM(2, 4), epochs=1, settle=settle)[0].errors for settle in (None, settled, not settled)]
        assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize("gated", [True, False])
def test_epoch_zero_without_settling_is_the_solver_alone(gated):
    ffn = part("relu", gated)
    found, x = solve(ffn, NM(2, 4), epochs=0, settle=False)
    hidden = ffn.hidden(*ffn.branches(ffn.weights, x))
    for role, weight in ffn.weights.items():
        alone = sparsegpt(weight, Stats.of(hidden if role == "down" else x), NM(2, 4))
        torch.testing.assert_close(found.weights[role], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_with_nothing_to_prune_the_output_stays_dense(name):
    ffn = part(name, True, torch.float32)
    found, x = solve(ffn, Unstructured(0.0), wanda)
    torch.testing.assert_close(output(ffn, found.weights, x), output(ffn, ffn.weights, x))
    assert max(found.errors) < 1e-10


def test_any_solver_and_a_store_on_disk(tmp_path):
    ffn = part("gelu", True, torch.float32)
    memory, disk = (solve(ffn, NM(1, 4), wanda, budget=budget)[0] for budget in (10**9, 0))
    assert all(torch.equal(memory.weights[role], disk.weights[role]) for role in ffn.weights)
    assert min(memory.errors) < memory.errors[0] or memory.epoch == 0


def test_two_processes_see_the_sums_of_both():
    """Half of the tokens here and the same half there is as good as all tokens twice."""
    ffn = part("silu", True)
    alone = solve(ffn, NM(2, 4))[0]
    both = solve(ffn, NM(2, 4), add_up=lambda sums: [tensor.mul_(2) for tensor in sums])[0]
    assert both.errors == pytest.approx(alone.errors, rel=1e-3)


def test_parts_whose_output_is_zero():
    ffn = part("relu", False, torch.float32)
    ffn = FeedForward("relu", ffn.gate * 0, ffn.down, None, ffn.gate_bias * 0)
    found, _ = solve(ffn, NM(2, 4))
    assert all(weight.isfinite().all() for weight in found.weights.values())


def test_the_last_iterate_is_taken_as_published():
    """Every answer of the solver is taken: none is compared with the weight before, and the last epoch's is kept."""
    ffn, answers = part("silu", True), []

    def spy(weight, stats, pattern):
        answers.append(wanda(weight, stats, pattern))
        return answers[-1]

    found = solve(ffn, NM(2, 4), solver=spy, epochs=3, settle=False, last=True)[0]
    assert found.epoch == 3 and len(answers) == 4 * 3  # four prunings of three linears
    for role, answer in zip(ffn.weights, answers[-3:], strict=True):
        assert torch.equal(found.weights[role], answer)
    safe = solve(ffn, NM(2, 4), solver=wanda, epochs=3, settle=False)[0]
    assert min(safe.errors) == safe.errors[safe.epoch] <= found.errors[-1]
