"""Hostile input for anybody's solver, criterion or stage, in one line each: what real models hold now and then."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.contracts import Decision
from sparsekit.maths import NM, Pattern, Stats, Unstructured, has_pattern
from sparsekit.model.structure import find_units
from sparsekit.testing.contexts import context, kinds_in_one_model, tiny_experts, tiny_mamba, tiny_model, tiny_tokens
from sparsekit.testing.solver import solved_twice
from sparsekit.testing.stage import run_stage

FILLED = {"experts": (tiny_experts, ".experts."), "mamba": (tiny_mamba, "_proj")}

OUT, WIDTH, TOKENS = 12, 24, 96
HOSTILE = (
    Unstructured(0.0),
    Unstructured(0.5),
    Unstructured(0.9),
    Unstructured(1 - 1 / (OUT * WIDTH)),
    NM(2, 4),
    NM(3, 4),
    NM(1, 8),
)


def fuzz_solver(solver: Callable[..., Tensor], patterns: Iterable[Pattern] = HOSTILE, seed: int = 0) -> None:
    """Raise AssertionError for the first hostile layer of which a solver gives no finite answer with the pattern.

    Layers: few tokens and one, dead, constant and equal columns, ties, scales from 1e-6 to 1e6, one huge input, one
    row, one column, weights of zeros, half precision's rounding, a dense stream far away. Every answer must be finite,
    have the pattern (more zeros are fine where weights or inputs are zero), and be the same bits twice; a ValueError
    with a sentence is an answer too, for whole layers of nothing.
    """
    for case, weight, stats in layers(seed):
        for pattern in patterns:
            if isinstance(pattern, NM) and weight.shape[1] % pattern.group:
                continue
            try:
                answer = solved_twice(solver, weight, stats, pattern)
            except ValueError as error:
                assert str(error).strip(), f"{case}, {pattern}: a ValueError without a sentence"
                continue
            except (RuntimeError, ArithmeticError, LookupError, TypeError) as error:
                raise AssertionError(f"{case}, {pattern}: {type(error).__name__}: {error}") from error
            assert has_pattern(answer, pattern), f"{case}: the answer is not {pattern}"


def layers(seed: int = 0) -> Iterator[tuple[str, Tensor, Stats]]:
    """Hostile layers: a name, a weight (out, in), statistics of its inputs."""
    random = torch.Generator().manual_seed(seed)

    def draw(tokens: int = TOKENS, out: int = OUT, width: int = WIDTH) -> tuple[Tensor, Tensor]:
        mix = torch.randn(width, width, generator=random) / width**0.5 + 0.3 * torch.eye(width)
        return 0.05 * torch.randn(out, width, generator=random), torch.randn(tokens, width, generator=random) @ mix

    for tokens in (1, 8):
        weight, inputs = draw(tokens)
        yield f"{tokens} tokens", weight, Stats.of(inputs)
    for scale in (1e-6, 1e6):
        weight, inputs = draw()
        yield f"inputs x {scale:g}", weight, Stats.of(inputs * scale)
        yield f"weights x {scale:g}", weight * scale, Stats.of(inputs)
    for name, column, value in (("dead", slice(0, None, 5), 0.0), ("constant", slice(3, 7), 1.0)):
        weight, inputs = draw()
        inputs[:, column] = value
        yield f"{name} columns", weight, Stats.of(inputs)
    weight, inputs = draw()
    yield "equal columns", weight, Stats.of(inputs[:, :1].expand(-1, WIDTH).contiguous())
    inputs[:, 3] *= 1e4
    inputs[:, 4] *= 1e-4
    yield "a huge and a tiny column", weight, Stats.of(inputs)
    weight, inputs = draw()
    yield "equal weights", torch.full_like(weight, 0.25), Stats.of(inputs)
    yield "weights of two sizes", weight.sign() * 0.25, Stats.of(torch.ones_like(inputs))
    yield "weights of zeros", torch.zeros_like(weight), Stats.of(inputs)
    yield "inputs of zeros", weight, Stats.of(torch.zeros_like(inputs))
    sparse = weight.clone()
    sparse[:, ::3] = 0
    sparse[3] = 0
    yield "some weights of zero", sparse, Stats.of(inputs)
    yield "values of bfloat16", weight.bfloat16().float(), Stats.of(inputs.bfloat16().float())
    yield "a far dense stream", weight, Stats.of(inputs * 0.3, inputs * 2)
    for out, width in ((1, WIDTH), (16, 1), (1, 1)):
        weight, inputs = draw(out=out, width=width)
        yield f"{out} x {width}", weight, Stats.of(inputs)


def fuzz_criterion(criterion: Callable[..., Any], **options: Any) -> None:
    """Raise AssertionError unless a criterion scores hostile models by finite numbers, or refuses them in a sentence.

    Models: one KV head for all queries, weights that are all alike, and one whose activations overflow; for experts
    and Mambas, alike ones, zeros, and such as overflow.
    """
    scoring = criterion.scoring  # type: ignore[attr-defined]
    for known in kinds_in_one_model(scoring.kinds):
        build, inside = FILLED.get(known[0], (tiny_model, ""))
        for case, model in hostile_models(build, inside) if inside else models():
            with TemporaryDirectory() as folder:
                here = context(model, tiny_tokens(), folder, batch=2, index=1)
                units = find_units(model, here.blocks, known)
                try:
                    answer = criterion(here, units, remove=0.3, **options)
                except ValueError as error:
                    assert str(error).strip(), f"{case}: a ValueError without a sentence"
                    continue
            scores = (answer if isinstance(answer, Decision) else Decision(answer)).scores
            assert scores.shape == (len(units),) and scores.isfinite().all(), f"{case}: scores are not all finite"


def fuzz_stage(stage: Callable[..., Any], *, pattern: str = "2:4", tokenizer: Any = None, **options: Any) -> None:
    """Raise AssertionError unless a stage leaves finite weights in hostile models, or refuses them in a sentence."""
    for case, model in models():
        with TemporaryDirectory() as folder:
            try:
                run_stage(stage, Path(folder), pattern, tokenizer, options, model)
            except ValueError as error:
                assert str(error).strip(), f"{case}: a ValueError without a sentence"
                continue
        finite = all(parameter.isfinite().all() for parameter in model.parameters())
        assert finite, f"{case}: weights are not finite afterwards"


def hostile_models(build: Callable[[], nn.Module], inside: str) -> Iterator[tuple[str, nn.Module]]:
    """A model whose parameters with `inside` in their names are all alike, overflow, or are zeros: a name, and it."""
    for case, value in {"all alike": 0.02, "overflowing": 3e38, "zeros": 0.0}.items():
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if inside in name:
                    parameter.fill_(value)
        yield f"{inside} {case}", model


def models() -> Iterator[tuple[str, nn.Module]]:
    """Hostile models: a name, and the model."""
    yield "one KV head", tiny_model(kv_heads=1)
    alike = tiny_model()
    with torch.no_grad():
        for parameter in alike.parameters():
            parameter.fill_(0.02)
    yield "weights that are all alike", alike
    huge = tiny_model()
    with torch.no_grad():
        huge.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(3e38)
    yield "activations that overflow", huge
