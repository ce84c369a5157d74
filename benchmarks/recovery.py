"""What the mask costs in a training step: time and peak memory beside peft's plain LoRA, on blocks of a real model.

    python -m benchmarks.recovery [--model smollm2-135m] [--blocks 4] [--batch 4] [--length 512] [--head]

The first blocks, their linears pruned to 50 % by magnitude, are trained on random tokens. Times: variants take turns in
one process, the ratio is that of the medians (and of the fastest steps). Memory: each variant in a process of its
own, the peak of resident memory over what the model and the adapter need. Without --head the loss is one on the hidden
states: the vocabulary's product, which costs every variant the same, would hide the difference.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import peft
import psutil
import torch
from torch import Tensor, nn

from benchmarks.show import show
from sparsekit.maths import parse
from sparsekit.model import find_blocks, load_plain, locate
from sparsekit.system import session
from sparsekit.train import attach_updates

KINDS = ["peft", "dense", "masked", "scale", "prune"]
COLUMNS = ["update", "step", "ratio", "ratio of fastest", "peak memory", "ratio of memory"]


def pruned(given: argparse.Namespace) -> Any:
    """The model's first blocks, 50 % of each row gone."""
    with session():
        model, _ = load_plain(locate(given.model), dtype="float32")
    layers = model.get_submodule(find_blocks(model)[0].name.rpartition(".")[0])
    del layers[given.blocks :]  # type: ignore[operator]
    for block in find_blocks(model):
        for linear in block.linears.values():
            linear.write_pruned(linear.weight * parse("50%").keep(linear.weight.abs(), per="row"))
    return model


def stepper(model: Any, kind: str, given: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one training step. kind: peft is its own LoRA, dense ours without masks."""
    model.requires_grad_(False)
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    if kind == "peft":
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=[linear.name for linear in linears])
        peft.inject_adapter_in_model(config, model)
    else:
        masks = {} if kind == "dense" else {linear.name: linear.weight != 0 for linear in linears}
        variant: Any = "masked" if kind == "dense" else kind
        for layer in attach_updates(model, linears, masks, variant=variant).values():
            layer.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (given.batch, given.length), generator=generator)

    def step() -> None:
        _loss(model, ids, given.head).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(model: Any, ids: Tensor, head: bool) -> Tensor:
    if not head:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().mean()
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def memory(kind: str, given: argparse.Namespace) -> int:
    """Bytes at the peak of three steps, over the loaded model."""
    model = pruned(given)
    loaded = psutil.Process().memory_info().rss
    step = stepper(model, kind, given)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - loaded


def times(given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step by kind, in turns."""
    model = pruned(given)
    steps = {kind: stepper(copy.deepcopy(model), kind, given) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(given.steps + 1):
        for kind, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[kind].append(time.perf_counter() - began)
    return {kind: taken[1:] for kind, taken in seconds.items()}  # the first has the libraries' own start in it


def _apart(kind: str, argv: Sequence[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.recovery", *argv, "--alone", kind]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("benchmarks.recovery", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="whatever a recipe's `model` could name")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--head", action="store_true", help="with the vocabulary's product and its loss")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--alone", choices=KINDS, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(argv)
    if given.alone:
        print(memory(given.alone, given))
        return
    peaks = {kind: _apart(kind, argv) for kind in KINDS}
    taken = times(given)
    middle = {kind: median(seconds) for kind, seconds in taken.items()}
    rows = [
        [
            kind,
            f"{middle[kind]:.2f} s",
            f"{middle[kind] / middle['peft']:.2f}",
            f"{min(taken[kind]) / min(taken['peft']):.2f}",
            f"{peaks[kind] / 2**20:.0f} MiB",
            f"{peaks[kind] / peaks['peft']:.2f}",
        ]
        for kind in KINDS
    ]
    show(COLUMNS, rows, markdown=given.markdown)


if __name__ == "__main__":
    main()
