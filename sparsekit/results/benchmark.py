"""`sparsekit bench`: what a model takes, parameters, file, memory and time, beside the one it was made from.

Each model lives in a process of its own, so that its memory is its own. The processes work in turn, never at the same
time, one repeat each (A B A B ...): what else a machine does then hits both, and the quotient within a turn stays fair.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from sparsekit.measure import check_evaluation
from sparsekit.model import auto_class, locate, sees_images, skeleton
from sparsekit.results.backends import BACKENDS, check_backend
from sparsekit.results.figures import figures_of, label, shown
from sparsekit.results.folder import source_of
from sparsekit.system import hardware, human_size, versions

SPREAD = "In brackets: between what half of the turns lie. Where that is wide, the machine was busy: measure again."


def bench(
    models: Sequence[str | Mapping[str, Any]],
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    new: int = 32,
    repeat: int = 5,
    device: str | None = None,
    backend: str = "transformers",
    precision: str = "source",
    evaluation: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure models, each as a recipe's `model` could name it: the one in question first, the dense one second.

    prompt, new: tokens of the prompt and tokens generated after it. repeat: turns, after one that does not count.
    device: where to run, None for the accelerator where there is one
    backend: transformers; compiled, the same by torch.compile; semi-structured, with torch's tensors for 2:4 on CUDA;
        llama.cpp (on the CPU, one sequence at a time), which is given the models as GGUF files of this `precision` (see
        the exporter `gguf`); onnxruntime or openvino (on the CPU), a forward pass over the prompt alone, with the
        logits of all its tokens
    evaluation: as `evaluate.evaluate` takes it
    say: is called with a line of progress.

    Returns:
        {"settings", "hardware", "versions", "models"}, and with two models "faster" and "spread".
        models: name, class, dtype, parameters, nonzero; file_bytes, the files of weights that are loaded; weights_bytes
            in memory; memory_bytes, the peak of the process while it generates at the largest batch (not of onnxruntime
            and openvino, whose process has written their file too), and on
            accelerators that count it device_bytes, the peak there; by batch size, as text, the medians of
            prefill_seconds (one forward pass over the prompt as generation makes it, logits of the last token alone)
            and decode_seconds (one token with the KV cache), of a vision model images_seconds (a forward pass of the
            batch, over its size); and what `evaluation` gives
        faster: {"prefill", "decode"}, or {"images"}, by batch size: how many times the first is as fast as the second,
            the median over the turns of the quotient within a turn
        spread: the quartiles beside that median

    Raises:
        ValueError: a model cannot be loaded, or its position table is shorter than prompt + new.
        OSError: a process died, as where memory does not suffice.
    """
    if evaluation:
        check_evaluation(evaluation)
    specs = [{"path": model} if isinstance(model, str) else dict(model) for model in models]
    names = [str(spec["path"]) for spec in specs]
    folders = [locate(spec) for spec in specs]
    seen = {place: _sees(place) for place in folders}
    own = backend not in BACKENDS or BACKENDS[backend].torch  # one that is unknown is refused below
    for place, images in seen.items():
        if images is None:
            raise ValueError(
                f"{place} neither writes text nor sees images alone; bench measures models that do one of the two"
            )
        if images and not own:
            raise ValueError(f"{place} sees images, and {backend} is for language models here: leave the backend out")
    if len(set(seen.values())) > 1:
        raise ValueError(
            f"{folders[0]} and {folders[1]} are not given the same, one sees images: compare like with like"
        )
    device = device or str((own and torch.accelerator.current_accelerator()) or "cpu")
    check_backend(backend, folders, list(batches), device, precision)
    keys = ("images",) if seen[folders[0]] else BACKENDS[backend].times
    if evaluation and backend != "transformers":
        raise ValueError(f"quality is measured in transformers, not in {backend}: leave it out")
    tasks = [
        {"op": "memory", "batch": max(batches), "prompt": prompt, "new": new},
        *({"op": "latency", "batch": batch, "prompt": prompt, "new": new} for batch in batches),
    ]
    with _workers(specs, folders, device, backend, precision) as ask:
        found = []
        for index, name in enumerate(names):
            say(f"{name}: loading, and its memory")
            memory = ask(index, tasks[0])  # before anything else touches its weights
            found.append({"name": name, **ask(index, {"op": "facts"}), **memory})
        times: dict[str, list[list[dict[str, float]]]] = {}  # batch -> turns -> models
        for task in tasks[1:]:
            say(f"batch {task['batch']}: {repeat} turns")
            turns = [[ask(index, task) for index in range(len(names))] for _ in range(repeat + 1)]
            times[str(task["batch"])] = turns[1:]  # the first warms caches and allocators up
        if evaluation:
            wanted = dict(evaluation)
            for index in reversed(range(len(names))):  # the dense one, which is last, decides how windows begin
                say(f"{names[index]}: measuring its quality")
                found[index] |= ask(index, {"op": "evaluate", "settings": wanted})
                wanted |= {"bos": bos["used"]} if (bos := found[index].get("bos")) else {}
    for index, values in enumerate(found):
        for key in keys:
            values[f"{key}_seconds"] = {
                batch: median(turn[index][key] for turn in turns) for batch, turns in times.items()
            }
    settings = {"batches": list(batches), "prompt": prompt, "new": new, "repeat": repeat, "device": device}
    settings |= {"backend": backend} | ({"precision": precision} if backend == "llama.cpp" else {})
    result: dict[str, Any] = {
        "settings": settings,
        "hardware": hardware(),
        "versions": versions(BACKENDS[backend].packages),
    }
    result["models"] = found
    if len(models) == 2:
        ratios = {
            key: {batch: [dense[key] / own[key] for own, dense in turns] for batch, turns in times.items()}
            for key in keys
        }
        for name, summary in (("faster", median), ("spread", _middle)):
            result[name] = {key: {batch: summary(each) for batch, each in ratios[key].items()} for key in ratios}
    return result


def _sees(folder: Path) -> bool | None:
    """Whether a model is given images; None: it is given something that bench has none of."""
    if auto_class(folder).__name__ == "AutoModelForCausalLM":
        return False
    return True if sees_images(skeleton(folder)) else None


def _middle(values: Sequence[float]) -> list[float]:
    """Between what half of the values lie."""
    return quantiles(values, method="inclusive")[::2] if len(values) > 1 else [values[0]] * 2


@contextmanager
def _workers(
    specs: Sequence[dict[str, Any]],
    folders: Sequence[Path],
    device: str,
    backend: str = "transformers",
    precision: str = "source",
) -> Iterator[Callable[[int, dict[str, Any]], dict[str, Any]]]:
    """Gives ask(index, task): have the process of a model do a task, wait, and take its answer."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for spec, place in zip(specs, folders, strict=True):
            ours, theirs = context.Pipe()
            arguments = (theirs, spec, place, device, torch.get_num_threads(), precision)
            process = context.Process(target=BACKENDS[backend].serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)

        def ask(index: int, task: dict[str, Any]) -> dict[str, Any]:
            try:
                pipes[index].send(task)
                answer = pipes[index].recv()
            except (EOFError, ConnectionError) as error:
                processes[index].join()
                raise OSError(
                    f"the process that measured {folders[index]} ended by itself (exit {processes[index].exitcode}); "
                    "-9 means that memory did not suffice: give a smaller --batch"
                ) from error
            if isinstance(answer, Exception):
                raise answer
            return answer

        yield ask
    finally:
        for pipe in pipes:
            pipe.close()  # the process sees the end of its tasks
        for process in processes:
            process.join(timeout=10)
            process.kill()


def models_of(path: str, against: str | None = None) -> list[str | dict[str, Any]]:
    """The models to measure: the one at `path`, and `against`, or else what its run was made from, if it has one."""
    source = source_of(path)
    own = {"path": path, "trust_remote_code": bool(source and source.get("trust_remote_code"))}
    return [own, *([against or source] if against or source else [])]  # type: ignore[list-item]


def bench_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The result as lines of text: what, one value for each model, and with two how they relate."""
    models = result["models"]
    two = len(models) == 2
    some = ("weights_bytes", "memory_bytes", "device_bytes")
    there = {key for key in some if all(key in model for model in models)}  # not every backend tells
    doing = "seeing" if "images_seconds" in models[0] else "generating"

    def line(what: str, key: str, show: Callable[[Any], str], relation: str) -> tuple[str, ...]:
        quotient = models[0][key] / models[1][key] if two and models[1][key] else None
        return (what, *(show(model[key]) for model in models), *([relation.format(quotient)] if quotient else []))

    lines = [
        line("parameters", "parameters", "{:,}".format, "{:.3f}"),
        line("of them not zero", "nonzero", "{:,}".format, "{:.3f}"),
        line("weights on disk", "file_bytes", human_size, "{:.3f}"),
        *([line("weights in memory", "weights_bytes", human_size, "{:.3f}")] if "weights_bytes" in there else []),
        *(
            [line(f"peak memory of the process, {doing}", "memory_bytes", human_size, "{:.3f}")]
            if "memory_bytes" in there
            else []
        ),
        *([line("peak memory on the device", "device_bytes", human_size, "{:.3f}")] if "device_bytes" in there else []),
        ("dtype", *(model["dtype"] for model in models), *([""] if two else [])),
    ]
    kinds = (("prefill", "prefill of {prompt} tokens"), ("decode", "decode, a token"), ("images", "an image"))
    for key, what in kinds:
        for batch in map(str, result["settings"]["batches"]) if f"{key}_seconds" in models[0] else ():
            times = [f"{model[f'{key}_seconds'][batch] * 1000:.1f} ms" for model in models]
            relation = [_ratio(result["faster"][key][batch], *result["spread"][key][batch])] if two else []
            lines.append((f"{what.format(**result['settings'])}, batch {batch}", *times, *relation))
    figures = [figures_of(model) for model in models]
    for name, first in figures[0].items():
        relation = [f"{first.value / figures[1][name].value:.3f}"] if two else []
        lines.append((label(name, first), *(shown(replace(of[name], stderr=None)) for of in figures), *relation))
    return lines


def _ratio(value: float, low: float, high: float) -> str:
    return f"{value:.2f} x as fast ({low:.2f} to {high:.2f})"


def bench_table(result: Mapping[str, Any]) -> Any:
    """The result as a rich table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    found = Table(
        "",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"in {result['settings'].get('backend', 'transformers')} on {result['settings']['device']}, "
        f"{result['hardware']['threads']} threads",
    )
    found.title_justify = found.caption_justify = "left"
    for model in result["models"]:
        found.add_column(escape(model["name"]), justify="right", overflow="fold")
    if len(result["models"]) == 2:
        found.add_column("first to second", justify="right")
        found.caption = SPREAD
    for row in bench_rows(result):
        found.add_row(*map(escape, row))
    return found
