"""One model's part of a benchmark: a process that holds it and measures it when asked."""

import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.data import positions_of
from sparsekit.measure import evaluation as evaluate
from sparsekit.model import Checkpoint, channels_of, image_size, run_model, sees_images
from sparsekit.model import load as load_model
from sparsekit.system import Meter

SEED = 0  # of the tokens that are fed: what they are does not change the time


def serve(
    pipe: Any,
    spec: dict[str, Any],
    place: Path,
    device: str,
    threads: int,
    prepare: Callable[[Any], Any] | None = None,
) -> None:
    """The process of one model: load it at the first task, answer one task after another until the pipe is closed.

    pipe: see `attend`. spec: a recipe's `model`; place: the folder of its checkpoint. prepare: makes of the model what
    runs; its facts are then those of the model as it is stored
    """
    torch.set_num_threads(threads)
    opened: list[tuple[Any, Any]] = []

    def operation(do: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def run(**arguments: Any) -> dict[str, Any]:
            if not opened:
                model, tokenizer = load(spec, place, device)
                opened.append((prepare(model) if prepare else model, tokenizer))
            return do(*opened[0], place, **arguments)

        return run

    facts = operation(_facts) if prepare is None else partial(facts_of, spec, place)
    attend(pipe, {name: operation(do) for name, do in OPERATIONS.items()} | {"facts": facts})


def attend(pipe: Any, operations: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer one task after another until the pipe is closed.

    pipe: a multiprocessing connection; a task is {"op": a name of the operations, its arguments...}, its answer what
    that gives, or the ValueError or OSError it raised
    """
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(operations[task.pop("op")](**task))
        except (ValueError, OSError) as error:
            pipe.send(type(error)(str(error)))


def load(spec: Mapping[str, Any], place: Path, device: str) -> tuple[Any, Any]:
    """The model that a recipe's `model` names, in the dtype it says, where it is to run; and its tokenizer."""
    from sparsekit.system import session

    dtype = None if spec.get("dtype") in (None, "auto") else str(spec["dtype"])
    with session():
        model, tokenizer = load_model(place, dtype=dtype, trust_remote_code=bool(spec.get("trust_remote_code")))
    return model.to(device), tokenizer


def _facts(model: Any, tokenizer: Any, place: Path) -> dict[str, Any]:
    weights = list(model.parameters())
    return {
        "class": type(model).__name__,
        "dtype": ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
        "parameters": sum(weight.numel() for weight in weights),
        "nonzero": sum(int(weight.count_nonzero()) for weight in weights),
        "weights_bytes": sum(tensor.nbytes for tensor in [*weights, *model.buffers()]),
        "file_bytes": sum(file.stat().st_size for file in Checkpoint(place).files),
    }


def facts_of(spec: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Class, dtype, numbers and bytes of a model, which is loaded for a moment."""
    return _facts(*load(spec, place, "cpu"), place)


def _memory(model: Any, tokenizer: Any, place: Path, **sizes: int) -> dict[str, int]:
    positions = None
    if not sees_images(model):
        positions = positions_of(model.config)
    if positions is not None and positions < sizes["prompt"] + sizes["new"]:
        raise ValueError(
            f"{place} has {positions} positions, and {sizes['prompt']} tokens of prompt and {sizes['new']} new ones "
            "were asked for; give a smaller --prompt or --new"
        )
    with Meter() as meter:
        with meter.stage("generate"):
            latency(model, **sizes)
    on_device = {"device_bytes": meter.device_peak["generate"]} if meter.device_peak else {}
    return {"memory_bytes": meter.peak["generate"]} | on_device


@torch.no_grad()
def latency(model: Any, batch: int, prompt: int, new: int) -> dict[str, float]:
    """{"prefill": seconds of a forward pass over the prompt, "decode": seconds a token of `new` greedy ones after it}.

    Both as `generate` makes them: with a KV cache, and logits of the last token alone where the model can do so. Of a
    vision model {"images": seconds an image of a forward pass of so many}; of SAM its image encoder's.
    """
    device = next(model.parameters()).device
    if sees_images(model):
        pixels = torch.zeros(batch, channels_of(model.config), *image_size(model.config))
        start = _now(device)
        run_model(model, pixels.to(device))
        return {"images": (_now(device) - start) / batch}
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(vocabulary, (batch, prompt), generator=generator).to(device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    step = partial(model, use_cache=True, **last)
    start = _now(device)
    out = step(input_ids=tokens)
    prefilled = _now(device)
    for _ in range(new):
        chosen: Tensor = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        out = step(input_ids=chosen, past_key_values=out.past_key_values)
    return {"prefill": prefilled - start, "decode": (_now(device) - prefilled) / new}


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _evaluate(model: Any, tokenizer: Any, place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return evaluate.evaluate(model, tokenizer, settings)


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "memory": _memory,
    "latency": lambda model, tokenizer, place, **sizes: latency(model, **sizes),
    "evaluate": _evaluate,
}
