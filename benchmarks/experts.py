"""Mixtures of experts: what their Gram matrices are best made of, and which experts are best removed.

    python -m benchmarks.experts grams [--others 0 0.5 1 2 4 1000] [--alike] [--seeds 0 1 2]
    python -m benchmarks.experts units [--seeds 0 1 2]

tests/models/tiny-moe (16 experts, two for each token). grams: SparseGPT at 2:4; others of 0: an expert's own tokens and
one other of each pass; of 1: as many others as it has inputs; of 1000: all. A token counts by the router's weight, or
with --alike like any other. Calibration: samples x tokens of the
training topics of python-docs; perplexity on 64 windows of 128 tokens of its test topics. units: a quarter of the
experts (the share of the blocks' parameters that is four of 16), by each criterion, by chance, and by policy gradient
from REAP.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sparsekit
from sparsekit.data import corpus
from sparsekit.measure import perplexity
from sparsekit.model import Experts, discover, load_plain
from sparsekit.model.structure import find_units

MODEL = Path(__file__).parents[1] / "tests" / "models" / "tiny-moe"
FEWER = {"masks": 4, "batch": 2, "sharpness": 4, "held_out": 0.125}
TEXTS = ((96, 128), (24, 128), (4, 32), (2, 32))


def held_out(tokenizer: Any, choosing: bool = False, windows: int = 64, length: int = 128) -> torch.Tensor:
    """The first windows of the test topics (windows, length); for choosing a default the next ones."""
    text = corpus({"source": "python-docs"}, "test")
    ids = tokenizer(text.separator.join(text.documents))["input_ids"]
    start = windows * length * choosing
    return torch.tensor(ids[start : start + windows * length]).view(windows, length)


def pruned(stages: Sequence[Any], samples: int, length: int, seed: int, pattern: str | None) -> Any:
    """The model after these stages."""
    model, tokenizer = load_plain(MODEL)
    text = {"source": "python-docs", "samples": samples, "length": length, "seed": seed}
    return sparsekit.prune(model, tokenizer, pattern=pattern, stages=stages, calibration=text, seed=seed).model


def grams(others: Sequence[float], seeds: Sequence[int], choosing: bool) -> None:
    """A row for each number: mean perplexity over seeds for each amount of text."""
    _, tokenizer = load_plain(MODEL)
    test = held_out(tokenizer, choosing)
    print("| others, in inputs | " + " | ".join(f"{n} x {length}" for n, length in TEXTS) + " |", flush=True)
    print("|---|" + "---|" * len(TEXTS), flush=True)
    for other in others:
        Experts.others = other
        row = []
        for samples, length in TEXTS:
            found = [perplexity(pruned(["sparsegpt"], samples, length, s, "2:4"), test, batch=4) for s in seeds]
            row.append(f"{statistics.mean(found):.2f} ± {spread(found):.2f}")
        print(f"| {other} | " + " | ".join(row) + " |", flush=True)


def spread(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def units(seeds: Sequence[int], choosing: bool) -> None:
    """A row for each way: perplexity for each seed of the text."""
    model, tokenizer = load_plain(MODEL)
    test = held_out(tokenizer, choosing)
    print(f"dense {perplexity(model, test, batch=4):.2f}")
    blocks = discover(model, test[:1, :8])
    found = find_units(model, blocks, ["experts"])
    remove = 4 * len(found.parts) * float(found.parameters[0]) / found.total
    options = {"remove": remove}
    learn = options | {"units": "experts", "length": 128}
    ways: dict[str, Any] = {
        "reap": {"reap": options},
        "expert-frequency": {"expert-frequency": options},
        "expert-activation": {"expert-activation": options},
        "by chance": {"policy-gradient": learn | {"initial": "random", "steps": 1, "held_out": 0, "across": "block"}},
        "policy-gradient": {"policy-gradient": learn},
        "policy-gradient, a quarter of the passes": {"policy-gradient": learn | FEWER},
    }
    print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |\n|---|" + "---|" * len(seeds), flush=True)
    for name, stage in ways.items():
        row = [perplexity(pruned([stage], 128, 128, seed, None), test, batch=4) for seed in seeds]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grams", "units"])
    parser.add_argument("--others", type=float, nargs="+", default=[0, 0.5, 1, 2, 4, 1000])
    parser.add_argument("--alike", action="store_true", help="the router's weights count for nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choosing", action="store_true", help="on other windows than those that are reported")
    given = parser.parse_args()
    Experts.weighed = not given.alike
    if given.what == "grams":
        grams(given.others, given.seeds, given.choosing)
    else:
        units(given.seeds, given.choosing)


if __name__ == "__main__":
    main()
