"""The contract of an allocation rule, for the one-line test of anybody's."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from sparsekit import registry
from sparsekit.maths import Allocation
from sparsekit.model import discover
from sparsekit.testing.contexts import tiny_model, tiny_tokens


def check_allocator(rule: Callable[..., dict[str, float]], **options: Any) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `rule` breaks.

    A rule is `(linears, sparsity, [groups,] [dense,] [curvature,] *, options...) -> {name: sparsity}` with a
    docstring and keyword-only options with defaults. Every linear gets a sparsity from 0 to below 1, the total is
    conserved to 1e-6, and the same is given twice, at 30, 50 and 70 %.

    options: of the rule
    """
    assert (inspect.getdoc(rule) or "").strip(), "the rule has no docstring"
    parameters = list(inspect.signature(rule).parameters.values())
    assert [p.name for p in parameters[:2]] == ["linears", "sparsity"], "the first parameters are linears, sparsity"
    for parameter in registry.options(rule).values():
        assert parameter.default is not parameter.empty, f"option {parameter.name} has no default"
    blocks = discover(tiny_model(), tiny_tokens()[:1, :8])
    linears = {name: linear.weight.numel() for block in blocks for name, linear in block.linears.items()}
    beside = {"groups": [block.groups for block in blocks]}
    for sparsity in (0.3, 0.5, 0.7):
        found = []
        for _ in range(2):
            random = torch.Generator().manual_seed(0)
            dense = (
                (name, linear.weight.float(), torch.rand(linear.shape[1], generator=random) + 0.1)
                for block in blocks
                for name, linear in block.linears.items()
            )
            curvature = (
                (
                    name,
                    linear.weight.float(),
                    _gram(linear.shape[1]),
                    torch.rand(len(linear.weight), generator=random),
                )
                for block in reversed(blocks)
                for name, linear in block.linears.items()
            )
            given_it = beside | {"dense": dense, "curvature": curvature}
            asked = {key: value for key, value in given_it.items() if key in registry.asks(rule)}
            found.append(rule(dict(linears), sparsity, **asked, **options))
        given, again = (each.sparsity if isinstance(each, Allocation) else each for each in found)
        assert given == again, f"at {sparsity:.0%}: two calls gave different sparsities"
        assert given.keys() == linears.keys(), f"at {sparsity:.0%}: not every linear has a sparsity"
        assert all(0 <= value < 1 for value in given.values()), f"at {sparsity:.0%}: a sparsity is not in [0, 1)"
        total = sum(given[name] * count for name, count in linears.items()) / sum(linears.values())
        assert abs(total - sparsity) <= 1e-6, f"at {sparsity:.0%}: the total is {total:.4%}"


def _gram(width: int) -> torch.Tensor:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    return rows.T @ rows
