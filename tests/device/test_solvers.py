"""Every solver that is installed gives on an accelerator what it gives on the CPU, and leaves its answer there."""

import pytest
import torch

from sparsekit import registry
from sparsekit.maths import Stats, parse
from sparsekit.solvers.magnitude import magnitude

OUT, WIDTH = 96, 160


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) and correlated inputs (tokens, in), four for each column."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * WIDTH, WIDTH, generator=random) @ torch.randn(WIDTH, WIDTH, generator=random)
    return torch.randn(OUT, WIDTH, generator=random), inputs


@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4", "4:8"])
@pytest.mark.parametrize("name", registry.names("solvers"))
def test_same_answer_as_on_the_cpu(name, pattern, accelerator):
    """The same weights but for rounding; where that has turned a choice, no worse by a hundredth."""
    solver, pattern = registry.load("solvers", name), parse(pattern)
    weight, inputs = drawn()
    here, there = Stats.of(inputs), Stats.of(inputs.to(accelerator))
    init = [magnitude(weight, here, pattern)] if registry.start(solver) == "required" else []
    answer = solver(weight, here, pattern, *init)
    other = solver(weight.to(accelerator), there, pattern, *(each.to(accelerator) for each in init))
    assert other.device.type == accelerator and other.dtype == answer.dtype
    assert ((other.cpu() != 0) == (answer != 0)).float().mean() > 0.99
    assert here.error(other.cpu(), weight) <= 1.01 * here.error(answer, weight)


def test_sums_are_those_of_float64(accelerator):
    """Gram, squares and mean of inputs, and the error of a weight, beside float64 on the CPU."""
    weight, inputs = drawn()
    exact, there = Stats.of(inputs.double()), Stats.of(inputs.to(accelerator))
    for one, other in ((exact.gram, there.gram), (exact.squares, there.squares), (exact.mean, there.mean)):
        assert (other.cpu().double() - one).norm() <= 1e-5 * one.norm()
    pruned = weight * (weight.abs() > 0.7)
    error = there.error(pruned.to(accelerator), weight.to(accelerator))
    assert error == pytest.approx(exact.error(pruned.double(), weight.double()), rel=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_launches_of_sparsegpt(pattern, accelerator):
    """On CUDA, by torch's profiler: no more than one launch for a column."""
    if accelerator != "cuda":
        pytest.skip("launches are counted by CUDA's profiler")
    sparsegpt = registry.load("solvers", "sparsegpt")
    counts = []
    for width in (512, 1024):
        random = torch.Generator().manual_seed(0)
        stats = Stats.of(torch.randn(2 * width, width, generator=random).cuda())
        weight = torch.randn(512, width, generator=random).cuda()
        sparsegpt(weight, stats, parse(pattern))  # compiles the kernel
        stats._cache.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            sparsegpt(weight, stats, parse(pattern))
        counts.append(sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in seen.events()))
    assert counts[1] - counts[0] <= 512, counts
