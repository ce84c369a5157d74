"""What share of a device's own speed each part of the work reaches: a roofline table.

    python -m benchmarks.gpu [--width 4096] [--inner 11008] [--sequences 64] [--length 2048] [--json]

Runs on the accelerator that torch finds, else on the CPU at a small shape, and needs no network, no data sets and no
model: one random LLaMA block. What the device can do is measured on the spot: products of large square matrices in
bfloat16 and float32, and a copy of a large tensor. Each part's useful operations (multiply-adds count 2) over its
seconds are shown beside the float32 products, in which statistics and solvers compute; forward passes beside bfloat16.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from sparsekit.maths import Stats, parse
from sparsekit.model import discover
from sparsekit.registry import load
from sparsekit.system import hardware, versions
from sparsekit.train import reconstruct
from sparsekit.walk import BlockStream

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
SHAPES = {True: (4096, 11008, 64, 2048), False: (576, 1536, 8, 256)}  # width, inner, sequences, length


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The least of some runs, after one to warm up."""
    found = []
    for _ in range(1 + times):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def wait() -> None:
    """Until the accelerator has done what it was asked for."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def peaks(side: int) -> dict[str, float]:
    """Operations a second in products of square matrices, and bytes a second in a copy (read and written)."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        found[name] = 2 * side**3 / seconds(partial(torch.mm, a, b))
    large = torch.empty(4 * side * side, device=DEVICE)
    found["copy"] = 2 * large.nbytes / seconds(large.clone)
    return found


@torch.no_grad()
def solvers(width: int, out: int) -> dict[str, tuple[float, float]]:
    """Seconds and operations of one Gram of 4 tokens a column, and of solvers on one linear (out, width)."""
    inputs = torch.randn(4 * width, width, device=DEVICE, dtype=torch.bfloat16)
    stats, weight = Stats.of(inputs), torch.randn(out, width, device=DEVICE)
    found = {"Gram": (seconds(partial(Stats(width, DEVICE).add, inputs)), len(inputs) * width**2)}  # half of it is new
    product = 2 * out * width**2
    for name, pattern, work in (
        ("wanda", "2:4", 0.0),
        ("sparsegpt", "2:4", 0.5 * product + width**3),
        ("sparsegpt", "50%", 0.5 * product + width**3),
        ("alps", "2:4", 23 * product),
    ):
        solver = load("solvers", name)

        def solve(solver: Any = solver, pattern: str = pattern) -> None:
            stats._cache.clear()
            solver(weight, stats, parse(pattern))

        found[f"{name} {pattern}"] = (seconds(solve, 1), work)
    return found


def blocks(width: int, inner: int, sequences: int, length: int) -> dict[str, tuple[float, float]]:
    """Seconds and operations of a forward pass of one block, of a pass that gathers Grams, and of an epoch of lamp."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        vocab_size=1000,
        max_position_embeddings=length,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(0, 1000, (sequences, length))
    (block,) = discover(model, tokens[:1, :16])
    stream = BlockStream.over(model, [block], tokens)
    stream.move(DEVICE)
    block.to(DEVICE)
    chunks = [chunk.to(DEVICE) for chunk in stream.inputs]
    for index, chunk in enumerate(chunks):
        chunk.place = (stream.inputs.number, index)  # type: ignore[attr-defined]
    parameters = sum(p.numel() for p in block.module.parameters())
    count = sequences * length
    forward = 2 * count * parameters + 4 * sequences * length**2 * width / 2
    grams = sum(count * block.linears[names[0]].shape[1] ** 2 for names in block.groups)
    targets = [block(chunk) for chunk in chunks]

    def pass_over() -> None:
        for chunk in chunks:
            block(chunk)

    def gather() -> None:
        for _ in stream.statistics(block):
            pass

    def train() -> None:
        reconstruct(block, chunks, targets, epochs=1, learning_rate=1e-6)

    return {
        "forward pass": (seconds(pass_over), forward),
        "pass with Grams": (seconds(gather), forward + grams),
        "an epoch of lamp": (seconds(train, 1), 3 * forward),
    }


def main() -> None:
    """Print the table, and with --json the same as numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    shape = SHAPES[DEVICE.type != "cpu"]
    for name, value in zip(("width", "inner", "sequences", "length"), shape, strict=True):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    what = peaks(8192 if DEVICE.type != "cpu" else 1024)
    parts = solvers(given.width, given.inner) | blocks(given.width, given.inner, given.sequences, given.length)
    name = hardware()["accelerator"] or "the CPU"
    print(
        f"{name}: {what['float32'] / 1e12:.2f} TFLOP/s in float32, {what['bfloat16'] / 1e12:.2f} in bfloat16, ", end=""
    )
    print(f"{what['copy'] / 1e9:.0f} GB/s\n\n| part | seconds | TFLOP/s | of the device's own |\n|---|---|---|---|")
    for part, (took, work) in parts.items():
        own = what["bfloat16" if part in ("forward pass", "an epoch of lamp") else "float32"]
        speed = f"{work / took / 1e12:.2f} | {work / took / own:.0%}" if work else "- | -"
        print(f"| {part} | {took:.3f} | {speed} |")
    if given.json:
        print(json.dumps({"peaks": what, "parts": parts, "hardware": hardware(), "versions": versions()} | vars(given)))


if __name__ == "__main__":
    main()
