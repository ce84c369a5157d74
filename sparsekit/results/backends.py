"""Where a benchmark runs a model: in transformers, or in a client that reads another form of it."""

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from sparsekit.contracts import Finished
from sparsekit.measure import attend, facts_of, serve
from sparsekit.results.exporters.gguf import FILE, Precision, gguf, write_gguf
from sparsekit.results.exporters.llamacpp import PACKAGE
from sparsekit.system import Meter

BACKENDS = ("transformers", "llama.cpp")


def check_backend(
    backend: str, folders: list[Path], batches: list[int], device: str, precision: str = "source"
) -> None:
    """Raise ValueError for a backend that is not there, or does not run these models like this."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it can be {', '.join(BACKENDS)}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it can be {', '.join(get_args(Precision))}")
    if backend == "transformers":
        if precision != "source":
            raise ValueError(f"precision {precision} is for llama.cpp: give --backend llama.cpp, or leave it out")
        return
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        raise ValueError(f"llama.cpp is run by the package {PACKAGE}: pip install {PACKAGE}") from None
    if batches != [1]:
        raise ValueError("in llama.cpp one sequence at a time is measured: give --batch 1")
    if device != "cpu":
        raise ValueError(f"{PACKAGE} as it comes from the index runs on the CPU: there is no {device} for it")
    for folder in folders:
        if why := gguf().why_not(Finished(folder, {}, {}, dict, {})):
            raise ValueError(f"{folder}: {why}")


def server(backend: str) -> Callable[..., None]:
    """The function that a process of its own runs for a model: (pipe, spec, place, device, threads, precision)."""
    return _transformers if backend == "transformers" else _llamacpp


def _transformers(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    serve(pipe, spec, place, device, threads)


def _llamacpp(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    """Write the model as a GGUF file, and measure that in llama.cpp, whose own clocks tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it says much
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        running: list[Any] = []

        def run(batch: int, prompt: int, new: int) -> dict[str, float]:
            if not running:
                write_gguf(place, file, precision)
                running.append(_started(file, prompt + new + 8, threads))
            ids = (torch.arange(prompt) * 7919 % 97 + 5).tolist()
            settings = {"n_predict": new, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
            told = running[0].handle_completions({"prompt": ids, **settings})["timings"]
            return {"prefill": told["prompt_ms"] / 1000, "decode": told["predicted_ms"] / 1000 / told["predicted_n"]}

        def memory(**sizes: int) -> dict[str, int]:
            with Meter() as meter, meter.stage("generate"):
                run(**sizes)
            return {"memory_bytes": meter.peak["generate"]}

        def facts() -> dict[str, Any]:
            size = file.stat().st_size
            return facts_of(spec, place) | {"dtype": precision, "file_bytes": size, "weights_bytes": size}

        attend(pipe, {"latency": run, "memory": memory, "facts": facts})


def _started(file: Path, context: int, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)
