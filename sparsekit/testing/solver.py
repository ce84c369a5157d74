"""The contract of a solver, for the one-line test of anybody's: `sparsekit.testing.check_solver(solver)`."""

import inspect
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparsekit.contracts import held, needs_gram
from sparsekit.maths import NM, Norms, Pattern, Stats, Unstructured, parse, rows_apart
from sparsekit.solvers.magnitude import magnitude
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.testing.live import LiveMemory

PATTERNS = ("50%", "70%", "2:4", "4:8", "1:4", "4:8p", "10:12")
_SHAPES = ((96, 40), (24, 160))  # (out, in): tall, wide; neither width is a multiple of 128


def check_solver(solver: Callable[..., Tensor], patterns: Iterable[str | Pattern] = PATTERNS, seed: int = 0) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `solver` breaks.

    A solver is a function `(weight, stats, pattern, *, options...) -> weight` with a docstring, all options
    keyword-only and with defaults; it may have `init` after `pattern` to start from an earlier answer. It returns a new
    finite float32 matrix of the weight's shape with the pattern's zeros, the same for the same arguments, and changes
    none of them. What it says that it needs is enough (norms alone; memory, by its attribute), and rows that it says
    are apart (`maths.rows_apart`) are. That holds for tall and wide layers, correlated inputs, inputs that are always
    zero, equal weights and targets that come from a dense stream. With `init` its answer is no worse than init, or at
    least depends on it.
    """
    requires_init = _check_signature(solver)
    rounds = hasattr(getattr(solver, "func", solver), "grid")
    for pattern in map(parse, patterns):
        if _refused(solver, pattern, requires_init, seed):
            continue
        for shape in _SHAPES:
            weight, stats = _problem(shape, seed)
            answer = _solve(solver, weight, stats, pattern, requires_init)
            _check_zeros(answer, pattern, 0, f"{pattern}, shape {shape}", rounds)
            if requires_init is not None:
                _check_init(solver, weight, stats, pattern, answer)
            if rows_apart(solver, pattern):
                upper = _solve(solver, weight[: len(weight) // 3].contiguous(), stats, pattern, requires_init)
                same = torch.allclose(upper, answer[: len(upper)], rtol=1e-3, atol=1e-4)
                assert same, (
                    f"{pattern}: it says that each row's answer depends on that row alone, and others change it"
                )
        for case in ("a dead input", "equal weights", "a dense stream"):
            weight, stats = _problem(_SHAPES[0], seed, case)
            answer = _solve(solver, weight, stats, pattern, requires_init)
            dead = int((stats.gram.diagonal() == 0).sum()) * len(weight)
            _check_zeros(answer, pattern, dead, f"{pattern}, {case}", rounds)
        if not needs_gram(solver):
            weight, inputs = _drawn(_SHAPES[0], seed)
            kept = _solve(solver, weight, Stats.of(inputs), pattern, requires_init) != 0
            other = _solve(solver, weight, Norms.of(inputs), pattern, requires_init) != 0
            assert torch.equal(kept, other), f"{pattern}: it says that norms are enough, and keeps others by them"
    if hasattr(solver, "memory"):
        _check_memory(solver, seed, requires_init)


def _refused(solver: Callable[..., Tensor], pattern: Pattern, requires_init: bool | None, seed: int) -> bool:
    """Whether a solver refuses, in a sentence, what few hardware has: pairs, and groups that do not fill the width."""
    if not isinstance(pattern, NM) or not (pattern.pairs or pattern.slides):
        return False
    try:
        for shape in _SHAPES:
            _solve(solver, *_problem(shape, seed), pattern, requires_init)
    except ValueError as error:
        assert str(pattern) in str(error), f"{pattern}: it is refused by {str(error)!r}, which does not name it"
        return True
    return False


def _check_signature(solver: Callable[..., Tensor]) -> bool | None:
    """Whether the solver requires init; None if it has no such parameter."""
    parameters = list(inspect.signature(solver).parameters.values())
    names = [parameter.name for parameter in parameters[:3]]
    assert names == ["weight", "stats", "pattern"], f"the first parameters are {names}, not weight, stats, pattern"
    for parameter in parameters[3:]:
        if parameter.name == "init":
            continue
        assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} is not keyword-only"
        assert parameter.default is not parameter.empty, f"option {parameter.name} has no default"
    assert (inspect.getdoc(getattr(solver, "func", solver)) or "").strip(), "the solver has no docstring"
    init = inspect.signature(solver).parameters.get("init")
    return None if init is None else init.default is init.empty


def _check_memory(solver: Callable[..., Tensor], seed: int, requires_init: bool | None) -> None:
    """A solver holds no more than it says (`contracts.held`); small pieces aside."""
    for shape in ((768, 384), (384, 768)):
        weight, inputs = _drawn(shape, seed)
        stats = Stats.of(inputs)
        init = [magnitude(weight, stats, parse("50%"))] if requires_init else []
        stats.check("the inputs")
        _ = stats.gram  # filled in when it is first asked for
        with LiveMemory() as live, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solver(weight, stats, parse("50%"), *init)
        allowed = held(solver, *shape) + 2**20
        assert live.peak <= allowed, f"it says that it holds {allowed:,} bytes for {shape}, and holds {live.peak:,}"


def _drawn(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, twice as many as columns."""
    random = torch.Generator().manual_seed(seed)
    out, width = shape
    weight = torch.randn(out, width, generator=random)
    inputs = torch.randn(2 * width, width, generator=random) @ torch.randn(width, width, generator=random)
    return weight, inputs * (torch.rand(width, generator=random) + 0.1)


def _problem(shape: tuple[int, int], seed: int, case: str = "") -> tuple[Tensor, Stats]:
    """A weight and the statistics of correlated inputs."""
    weight, inputs = _drawn(shape, seed)
    width = shape[1]
    dense = None
    if case == "a dead input":
        inputs[:, width // 3] = 0
    elif case == "equal weights":
        weight = torch.full(shape, -0.5)
    elif case == "a dense stream":
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed + 1))
        dense = inputs + 0.1 * inputs.std() * noise
    return weight, Stats.of(inputs, dense)


def solved_twice(solver: Callable[..., Tensor], weight: Tensor, stats: Stats, pattern: Pattern) -> Tensor:
    """A solver's answer, finite and of the weight's shape, the same twice; AssertionError where it is not."""
    return _solve(solver, weight, stats, pattern, _check_signature(solver))


def _solve(
    solver: Callable[..., Tensor], weight: Tensor, stats: Norms, pattern: Pattern, requires_init: bool | None
) -> Tensor:
    init = magnitude(weight, stats, pattern) if requires_init else None
    answer = _call(solver, weight, stats, pattern, init)
    again = _call(solver, weight, stats, pattern, init)  # from the statistics' cache, if the solver uses it
    assert torch.equal(answer, again), f"{pattern}: two calls with the same arguments gave different answers"
    return answer


def _call(solver: Callable[..., Tensor], weight: Tensor, stats: Norms, pattern: Pattern, init: Tensor | None) -> Tensor:
    arguments = {"the weight": weight, "init": init, "the sum of tokens": stats.total}
    if isinstance(stats, Stats):
        arguments |= {"the Gram": stats.gram, "drift_cross": stats.drift_cross, "drift_gram": stats.drift_gram}
    else:
        arguments["the norms"] = stats.squares
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a user should know is no fault
        answer = solver(weight, stats, pattern) if init is None else solver(weight, stats, pattern, init=init)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor), f"{pattern}: the solver changed {name} in place"
    assert isinstance(answer, Tensor), f"{pattern}: the answer is a {type(answer).__name__}, not a tensor"
    assert answer.shape == weight.shape, f"{pattern}: the shape is {tuple(answer.shape)}, not {tuple(weight.shape)}"
    assert answer.dtype == weight.dtype, f"{pattern}: the answer is {answer.dtype}, not {weight.dtype}"
    assert answer.isfinite().all(), f"{pattern}: the answer contains NaN or Inf"
    shared = answer.untyped_storage().data_ptr() in {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    assert not shared, f"{pattern}: the answer shares memory with an argument"
    return answer


def _check_zeros(answer: Tensor, pattern: Pattern, dead: int, where: str, rounds: bool) -> None:
    """Exact counts; only `dead` weights, those of inputs that are always zero, may be zero beyond them.

    rounds: small weights that are kept may be rounded to zero
    """
    zeros, out = int((answer == 0).sum()), len(answer)
    if isinstance(pattern, NM):
        asked = len(answer) * pattern.whole(answer.shape[1]) // pattern.group * (pattern.group - pattern.kept)
        assert pattern.satisfied(answer), f"{where}: a group of {pattern.group} keeps more than {pattern.kept} weights"
        least = asked
    else:
        assert isinstance(pattern, Unstructured)
        asked = pattern.pruned(answer.numel())
        least = asked - out  # rounding down in every row, at most one weight a row
    assert zeros >= least, f"{where}: {zeros} of {answer.numel()} weights are zero, fewer than the {asked} asked for"
    assert rounds or zeros <= asked + dead, (
        f"{where}: {zeros} of {answer.numel()} weights are zero, more than the {asked} asked for"
    )


def _check_init(solver: Callable[..., Tensor], weight: Tensor, stats: Stats, pattern: Pattern, answer: Tensor) -> None:
    """From a good start the answer is no worse than the start, or at least another one than without it."""
    good = refit(weight, stats, pattern, sparsegpt(weight, stats, pattern), iterations=1000, damping=0.01)
    warm = _call(solver, weight, stats, pattern, good)
    used = not torch.equal(warm, answer) or stats.error(warm, weight) <= 1.001 * stats.error(good, weight)
    assert used, f"{pattern}: init makes no difference, though it is better than the answer"
