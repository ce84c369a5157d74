"""The strip of sparsegpt as a kernel of Triton: by its interpreter against the plain form, and compiled for a card."""

import os
import subprocess
import sys

import pytest
import torch

from sparsekit.maths import NM, Stats, Unstructured
from sparsekit.solvers.sparsegpt import factor, sparsegpt
from sparsekit.solvers.strips import kernel, launch, prune_strip

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


def drawn(count: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (count, out), some costs among them equal, and an upper factor."""
    random = torch.Generator().manual_seed(count)
    inputs = torch.randn(4 * count, count, generator=random) @ torch.randn(count, count, generator=random)
    columns = torch.randn(count, out, generator=random)
    columns[:, ::7] = 0.5
    return columns, factor(Stats.of(inputs).gram, 0.01)[0]


@pytest.mark.parametrize(("kept", "group"), [(0, 0), (2, 4), (4, 8), (1, 4), (2, 3)])
@pytest.mark.parametrize("count", [12, 16, 24])
def test_the_kernel_does_what_the_plain_form_does(kept, group, count):
    pytest.importorskip("triton")
    columns, upper = drawn(count, 200)
    scale = (torch.rand_like(columns) < 0.5) / upper.diagonal().unsqueeze(1)
    plain = [columns.clone(), scale.clone(), torch.empty_like(columns)]
    other = [columns.clone(), scale.clone(), torch.empty_like(columns)]
    prune_strip(plain[0], upper, *plain[1:], kept, group)
    launch(kernel(), other[0], upper, *other[1:], kept, group)
    for one, two in zip(plain, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    if group:
        assert torch.equal(plain[1] != 0, other[1] != 0)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsekit.solvers.strips import kernel

strides = ("column_stride", "upper_stride", "scale_stride", "error_stride")
signature = dict.fromkeys(("columns", "upper", "scale", "errors"), "*fp32")
signature |= dict.fromkeys(("out", "count", *strides), "i32")
for group in (0, 4, 8):
    sizes = {"STRIP": 16, "GROUP": group, "GONE": group // 2, "TILE": 128}
    source = ASTSource(fn=kernel(), signature=signature | dict.fromkeys(sizes, "constexpr"), constexprs=sizes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
"""


def test_the_kernel_compiles_for_a_card_that_is_not_here(tmp_path):
    """For an H100, by Triton's own compiler."""
    pytest.importorskip("triton")
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    file = tmp_path / "compile_strip.py"  # Triton reads the source of kernels, and wants the caller's too
    file.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(file)], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_a_solve_has_few_launches_and_does_not_wait(counting, pattern):
    """At most one launch a column, and no more waiting in a wide layer than in a narrow one."""
    seen = []
    for width in (256, 512):
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(2 * width, width, generator=random)
        stats = Stats.of(inputs.to("card"))
        weight = torch.randn(64, width, generator=random).to("card")
        with counting() as counts:
            sparsegpt(weight, stats, pattern)
        seen.append((sum(counts.launches.values()), sum(counts.syncs.values())))
    assert seen[1][0] - seen[0][0] <= 256
    assert seen[1][1] == seen[0][1], counts.syncs
