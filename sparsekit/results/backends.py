"""Where a benchmark runs a model: in transformers, or in a client that reads another form of it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from sparsekit.contracts import Finished
from sparsekit.measure import attend, facts_of, serve
from sparsekit.model import load, make_semi_structured, two_of_four
from sparsekit.results.exporters.forward import why_no_forward
from sparsekit.results.exporters.gguf import FILE, Precision, gguf, write_gguf
from sparsekit.results.exporters.llamacpp import PACKAGE
from sparsekit.results.exporters.onnx import PACKAGES, open_onnx, write_onnx
from sparsekit.results.exporters.openvino import open_openvino, write_openvino
from sparsekit.system import Meter

Serve = Callable[[Any, dict[str, Any], Path, str, int, str], None]  # pipe, spec, place, device, threads, precision


class Backend(NamedTuple):
    """serve: what a process of its own runs for a model

    times: of a language model what is measured; where there is no cache of keys and values nothing is generated
    packages: that run it; torch: whether it is transformers' own model, of whatever kind, on any device
    """

    serve: Serve
    times: tuple[str, ...] = ("prefill", "decode")
    packages: tuple[str, ...] = ()
    torch: bool = False


def check_backend(
    backend: str, folders: list[Path], batches: list[int], device: str, precision: str = "source", on: str = ""
) -> None:
    """Raise ValueError for a backend that is not there, or does not run these models like this.

    on: what is aimed at, prefill or decode; empty: whatever it measures
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it can be {', '.join(BACKENDS)}")
    if on and on not in BACKENDS[backend].times:
        raise ValueError(f"{backend} runs a forward pass without a cache here, so there is no {on}: give `on: prefill`")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it can be {', '.join(get_args(Precision))}")
    if precision != "source" and backend != "llama.cpp":
        raise ValueError(f"precision {precision} is for llama.cpp: give --backend llama.cpp, or leave it out")
    if BACKENDS[backend].torch:
        _check_torch(backend, folders, device)
        return
    for package in BACKENDS[backend].packages:
        try:
            version(package)
        except PackageNotFoundError:
            needed = " ".join(BACKENDS[backend].packages)
            raise ValueError(f"{backend} needs the package {package}: pip install {needed}") from None
    if device != "cpu":
        raise ValueError(f"{backend} as it comes from the index runs on the CPU: there is no {device} for it")
    if backend == "llama.cpp" and batches != [1]:
        raise ValueError("in llama.cpp one sequence at a time is measured: give --batch 1")
    for folder in folders:
        finished = Finished(folder, {}, {}, dict, {})
        if why := gguf().why_not(finished) if backend == "llama.cpp" else why_no_forward(finished, ()):
            raise ValueError(f"{folder}: {why}")


def _check_torch(backend: str, folders: list[Path], device: str) -> None:
    if backend == "compiled" and device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        raise ValueError("torch.compile makes C++ for the CPU, and there is no compiler (c++): install one")
    if backend == "semi-structured":
        if device != "cuda":
            raise ValueError(f"semi-structured is for CUDA, whose tensor cores multiply 2:4, and not for {device}")
        if folders and not two_of_four(load(folders[0])[0]):
            raise ValueError(f"{folders[0]} has no linear that is 2:4 with sides that tensor cores take")


def _transformers(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    serve(pipe, spec, place, device, threads)


def _compiled(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    """The same by torch.compile: the turn that does not count compiles."""

    def compiled(model: Any) -> Any:
        model.forward = torch.compile(model.forward, dynamic=True)
        return model

    serve(pipe, spec, place, device, threads, compiled)


def _semi_structured(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    """The same with torch's semi-structured tensors where a weight is 2:4; the dense model is as it is."""

    def made(model: Any) -> Any:
        if two_of_four(model):
            make_semi_structured(model)
        return model

    serve(pipe, spec, place, device, threads, made)


def _forward_alone(
    pipe: Any,
    spec: dict[str, Any],
    place: Path,
    threads: int,
    write: Callable[[Finished, Path, str], None],
    run_by: Callable[[Path, int], Callable[[Tensor, Tensor], Tensor]],
) -> None:
    """A forward pass over the prompt in another runtime, with the logits of all its tokens."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        running: list[Callable[[Tensor, Tensor], Tensor]] = []

        def run(batch: int, prompt: int, new: int) -> dict[str, float]:
            if not running:
                write(Finished(place, {}, {}, dict, {}), target, "f32")
                running.append(run_by(target, threads))
            ids = (torch.arange(batch * prompt) * 7919 % 97 + 5).view(batch, prompt)
            start = perf_counter()
            running[0](ids, torch.ones_like(ids))
            return {"prefill": perf_counter() - start}

        def memory(**sizes: int) -> dict[str, int]:
            run(**sizes)
            return {}  # that of a process which has written the file too says nothing of the runtime

        def facts() -> dict[str, Any]:
            size = sum(file.stat().st_size for file in target.iterdir())
            return facts_of(spec, place) | {"dtype": "float32", "file_bytes": size}

        attend(pipe, {"latency": run, "memory": memory, "facts": facts})


def _onnxruntime(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    _forward_alone(pipe, spec, place, threads, write_onnx, open_onnx)


def _openvino(pipe: Any, spec: dict[str, Any], place: Path, device: str, threads: int, precision: str) -> None:
    _forward_alone(pipe, spec, place, threads, write_openvino, open_openvino)


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


BACKENDS = {
    "transformers": Backend(_transformers, torch=True),
    "compiled": Backend(_compiled, torch=True),
    "semi-structured": Backend(_semi_structured, torch=True),
    "llama.cpp": Backend(_llamacpp, packages=(PACKAGE,)),
    "onnxruntime": Backend(_onnxruntime, ("prefill",), (*PACKAGES, "onnxruntime")),
    "openvino": Backend(_openvino, ("prefill",), ("openvino",)),
}
