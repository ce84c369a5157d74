"""A model that need not fit into memory: anonymous memory, and bytes asked to be read and written, of a whole run.

    python -m benchmarks.streamed make FOLDER [--blocks 32] [--width 4096] [--inner 11008]
    python -m benchmarks.streamed run FOLDER OUTPUT [--stages wanda] [--pattern 2:4] [--budget 4GB] [--kill-at 8]

`make` writes a random LLaMA in bfloat16, in shards, tensor by tensor (13.5 GB at the default shape of a 7B). `run`
starts `sparsekit fit` on it and watches the process from outside: RssAnon (memory that is no map of a file), and the
bytes that it asked the system to read and write (rchar and wchar of /proc/PID/io; what is read through memory maps is
not among them). `--kill-at N` kills it with SIGKILL once N blocks are committed, and resumes it. Linux only.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.model import Shards

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "models" / "tiny-llama"


def make(folder: Path, blocks: int, width: int, inner: int, vocabulary: int = 32000) -> None:
    """Write a random LLaMA whose weights are never in memory together."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    state = model.to(torch.bfloat16).state_dict()
    shards = Shards.lay_out(folder, state)
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        scale = tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.1
        drawn = torch.empty(tensor.shape).normal_(0.0 if tensor.dim() == 2 else 1.0, scale, generator=random)
        shards.write({name: drawn.to(tensor.dtype)})
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def watch(process: "subprocess.Popen[str]", output: Path, kill_at: int | None) -> dict[str, Any]:
    """Follow a run to its end: peaks of anonymous memory by committed blocks, and what it read and wrote."""
    peaks: dict[str, int] = {}
    asked = {"rchar": 0, "wchar": 0}
    proc, start = Path(f"/proc/{process.pid}"), time.perf_counter()
    while process.poll() is None:
        done = len(list((output / "blocks").glob("[0-9]*.safetensors")))
        try:
            anonymous = int(re.search(r"RssAnon:\s+(\d+)", (proc / "status").read_text())[1]) * 1024  # type: ignore[index]
            told = dict(line.split(": ") for line in (proc / "io").read_text().splitlines())
        except (OSError, TypeError, ValueError):
            break
        asked = {key: max(asked[key], int(told[key])) for key in asked}
        finished = (output / "model").is_dir()
        phase = "proof" if finished else f"block {done}" if done or (output / "weights").is_dir() else "start"
        peaks[phase] = max(peaks.get(phase, 0), anonymous)
        if kill_at is not None and done >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    return {"status": process.wait(), "peaks": peaks, "seconds": round(time.perf_counter() - start, 1), **asked}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The whole command, killed and resumed if asked to."""
    recipe = {
        "model": str(given.model),
        "pattern": given.pattern,
        "stages": [json.loads(stage) if stage.startswith("{") else stage for stage in given.stages],
        "calibration": {"source": "python-docs", "samples": given.samples, "length": given.length},
        "evaluate": {"samples": False},
        "loggers": [],
        "bos": "published",
        "output": str(given.output),
        **({"memory": {"budget": given.budget}} if given.budget else {}),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    file = given.output.with_suffix(".yaml")
    file.write_text(json.dumps(recipe))
    runs: list[dict[str, Any]] = []
    for kill_at in ([given.kill_at] if given.kill_at else []) + [None]:
        command = [sys.executable, "-m", "sparsekit", "fit", "--recipe", str(file), *(["--resume"] if runs else [])]
        with (given.output.with_suffix(".log")).open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
            runs.append(watch(process, given.output, kill_at))
    size = sum(each.stat().st_size for each in given.model.glob("*.safetensors"))
    return {"settings": {k: str(v) for k, v in vars(given).items()}, "model_bytes": size, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    making = kinds.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--blocks", type=int, default=32)
    making.add_argument("--width", type=int, default=4096)
    making.add_argument("--inner", type=int, default=11008)
    running = kinds.add_parser("run")
    running.add_argument("model", type=Path)
    running.add_argument("output", type=Path)
    running.add_argument("--stages", nargs="+", default=["wanda"])
    running.add_argument("--pattern", default="2:4")
    running.add_argument("--samples", type=int, default=8)
    running.add_argument("--length", type=int, default=128)
    running.add_argument("--budget")
    running.add_argument("--kill-at", type=int)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.blocks, given.width, given.inner)
        return
    found = run(given)
    for each in found["runs"]:
        ratio = {key: f"{each[key] / found['model_bytes']:.2f}" for key in ("rchar", "wchar")}
        peaks = {phase: f"{peak / 1e9:.2f} GB" for phase, peak in each["peaks"].items()}
        print(f"exit {each['status']}, {each['seconds']} s, read {ratio['rchar']} and wrote {ratio['wchar']} models")
        print(f"  anonymous memory: {peaks}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
