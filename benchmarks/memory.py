"""Peak memory of a walk beyond the loaded model, in blocks and the activation budget.

    python -m benchmarks.memory [--width 736] [--blocks 6] [--solver sparsegpt] [--budget 20MB]

A random LLaMA whose blocks are large enough to see (about 20 MB each in float32) is walked in a fresh process. Resident
memory is sampled by a thread every 5 ms; the same taken once the model is loaded and has run once on one sequence (so
that the libraries hold their own buffers) is subtracted. Allowed: three blocks plus the budget.
"""

import argparse
import gc
import json
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.walk_cost import touch
from sparsekit.model import Checkpoint
from sparsekit.recipe import load_recipe
from sparsekit.run import Plan, make_plan, run_stages
from sparsekit.system import Meter, give_back, session

RECIPE = """\
model: {model}
pattern: "2:4"
calibration: {{source: python-docs, samples: {samples}, length: {length}}}
memory: {{activations: {budget}}}
stages: [{solver}]
output: {output}
"""


def build(folder: Path, width: int, blocks: int, vocabulary: int = 512, dtype: torch.dtype = torch.float32) -> Path:
    """A random LLaMA with blocks of 11.6 width^2 parameters, saved."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def walk(folder: Path, model_folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Walk over a model; bytes of memory before, at the peak, and seconds."""
    text = RECIPE.format(model=model_folder, output=folder / "run", **vars(given))
    (folder / "recipe.yaml").write_text(text)
    planned = make_plan(load_recipe(folder / "recipe.yaml"))
    model, _ = _load(planned)
    touch(model)
    tokens = torch.randint(0, 512, (given.samples, given.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens[:1])
    gc.collect()
    give_back()  # else what the C library kept from loading would be counted in our favour
    process, seen, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.005):
            seen[0] = max(seen[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    with Meter() as meter:
        run_stages(planned, model, tokens, folder / "run", meter, Console(file=open("/dev/null", "w")))  # noqa: SIM115
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return {"before": before, "peak": seen[0], "seconds": seconds}


def _load(planned: Plan) -> tuple[torch.nn.Module, None]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(planned.folder).eval(), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=672)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--budget", default="20MB")
    given = parser.parse_args()
    with session(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small").mkdir()
        small = argparse.Namespace(**vars(given) | {"samples": 2})
        walk(folder / "small", build(folder / "small-model", 64, 2), small)  # libraries fill their own caches
        model = build(folder / "model", given.width, given.blocks)
        block = sum(Checkpoint(model).tensor(key).nbytes for key in Checkpoint(model) if ".layers.0." in key)
        (folder / "large").mkdir()
        seen = walk(folder / "large", model, given)
    budget = given.samples * given.length * given.width * 4
    kept = min(budget, int(float(given.budget.removesuffix("MB")) * 1e6))
    more = seen["peak"] - seen["before"]
    print(
        f"block {block / 1e6:.1f} MB, activations {budget / 1e6:.1f} MB of which {kept / 1e6:.1f} MB in memory; "
        f"peak beyond the loaded model {more / 1e6:.1f} MB = {(more - kept) / block:.2f} blocks + budget, "
        f"{seen['seconds']:.1f} s"
    )
    print(json.dumps({"settings": vars(given), "block_bytes": block, "kept_bytes": kept, "beyond_bytes": more}))


if __name__ == "__main__":
    main()
