"""`sparsekit bench` and `samples`: what is asked of a model, in which order, and what becomes of the times."""

import importlib.util
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsekit import cli
from sparsekit.measure import PROMPTS, samples
from sparsekit.measure.timing import latency
from sparsekit.model import load_plain
from sparsekit.results import bench, models_of
from sparsekit.results.benchmark import _workers, bench_rows

SIZES = {"prompt": 5, "new": 3}


class Recorded(nn.Module):
    """Stands for a model: writes down how it is called."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=11))
        self.calls: list[dict[str, Any]] = []
        self.forward = answer.__get__(self)  # type: ignore[method-assign]


def short(self: Any, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0):
    """A forward pass that can leave logits out."""
    self.calls.append({"ids": input_ids, "past": past_key_values, "cache": use_cache, "keep": logits_to_keep})
    logits = torch.nn.functional.one_hot((input_ids + 1) % 11, 11)[:, -1:]
    return SimpleNamespace(logits=logits, past_key_values=len(self.calls))


def whole(self: Any, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False):
    """A forward pass that cannot."""
    out = short(self, input_ids, past_key_values, use_cache)
    out.logits = torch.nn.functional.one_hot((input_ids + 1) % 11, 11)
    return out


@pytest.mark.parametrize(("answer", "kept"), [(short, 1), (whole, 0)])
def test_latency_generates_as_generate_does(answer: Callable[..., Any], kept: int) -> None:
    model = Recorded(answer)
    times = latency(model, batch=2, **SIZES)
    first, *rest = model.calls
    assert first["ids"].shape == (2, 5) and first["past"] is None and len(rest) == 3
    assert all(call["cache"] and call["keep"] == kept for call in model.calls)
    assert [call["past"] for call in rest] == [1, 2, 3]  # each pass gets the cache of the one before
    last = first["ids"][:, -1:]
    for call in rest:  # the likeliest token of the pass before
        last = (last + 1) % 11
        assert torch.equal(call["ids"], last)
    assert set(times) == {"prefill", "decode"} and min(times.values()) > 0


def test_models_work_in_turn_and_ratios_are_taken_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    seconds = {0: iter([9.0, 1.0, 2.0, 4.0]), 1: iter([9.0, 2.0, 2.0, 12.0])}  # the first of each warms up

    @contextmanager
    def workers(specs: Sequence[Any], folders: Sequence[Path], device: str, *_: str) -> Iterator[Callable[..., Any]]:
        def ask(index: int, task: dict[str, Any]) -> dict[str, Any]:
            asked.append((index, task["op"]))
            if task["op"] == "latency":
                value = next(seconds[index])
                return {"prefill": value, "decode": value / 10}
            return {"memory_bytes": 5} if task["op"] == "memory" else {"parameters": 7}

        yield ask

    monkeypatch.setattr("sparsekit.results.benchmark._workers", workers)
    monkeypatch.setattr("sparsekit.results.benchmark.locate", lambda spec: Path(spec["path"]))
    result = bench(["a", {"path": "b"}], batches=[4], repeat=3, device="cpu", **SIZES)
    assert asked[:4] == [(0, "memory"), (0, "facts"), (1, "memory"), (1, "facts")]
    assert asked[4:] == [(0, "latency"), (1, "latency")] * 4
    own, dense = result["models"]
    assert (own["name"], own["prefill_seconds"], dense["prefill_seconds"]) == ("a", {"4": 2.0}, {"4": 2.0})
    assert result["faster"]["prefill"] == {"4": 2.0}  # the median of 2, 1 and 3, not the quotient of the medians
    assert result["faster"]["decode"]["4"] == pytest.approx(2.0)
    assert result["spread"]["prefill"] == {"4": [1.5, 2.5]}


def test_a_real_model_in_its_own_process(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = tmp_path / "b.json", str(models / "tiny-llama")
    sizes = ["--batch", "2", "--prompt", "8", "--new", "2", "--repeat", "1"]
    text = ["--perplexity", "python-docs", "--windows", "2", "--length", "32"]
    assert cli.main(["bench", path, *sizes, *text, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    [found] = result["models"]
    with safe_open(models / "tiny-llama" / "model.safetensors", framework="pt") as handle:
        tensors = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert found["nonzero"] == sum(int((tensor != 0).sum()) for tensor in tensors)
    assert found["file_bytes"] == (models / "tiny-llama" / "model.safetensors").stat().st_size
    assert found["dtype"] == "float32" and found["memory_bytes"] > 10**7
    assert 4 * found["parameters"] <= found["weights_bytes"] < 4.1 * found["parameters"]
    assert found["prefill_seconds"]["2"] > 0 and found["decode_seconds"]["2"] > 0
    assert 1 < found["perplexity"]["python-docs"] < 100
    assert "faster" not in result and result["settings"]["prompt"] == 8
    printed = capsys.readouterr().out
    assert "prefill of 8 tokens, batch 2" in printed and f"{found['perplexity']['python-docs']:.2f}" in printed
    assert not multiprocessing.active_children()


def test_mistakes_and_deaths_of_a_process_are_told(models: Path) -> None:
    place = models / "tiny-llama"
    with _workers([{"path": str(place)}], [place], "cpu") as ask:
        with pytest.raises(ValueError, match="tokens of prompt and 2 new ones were asked for; give a smaller --prompt"):
            ask(0, {"op": "memory", "batch": 1, "prompt": 10**6, "new": 2})
        assert ask(0, {"op": "facts"})["class"] == "LlamaForCausalLM"  # it goes on
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(OSError, match=r"tiny-llama ended by itself \(exit -9\)"):
            ask(0, {"op": "facts"})
    assert not multiprocessing.active_children()


def test_a_run_is_measured_against_what_it_was_made_from(tmp_path: Path) -> None:
    source = {"path": "some/model", "dtype": "bfloat16", "trust_remote_code": True}
    (tmp_path / "report.json").write_text(json.dumps({"recipe": {"model": source}}))
    own = {"path": str(tmp_path), "trust_remote_code": True}
    assert models_of(str(tmp_path)) == [own, source]
    assert models_of(str(tmp_path), "other") == [own, "other"]
    assert models_of("x") == [{"path": "x", "trust_remote_code": False}]


def test_a_result_is_kept_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name": "m", "dtype": "float32", "parameters": 10, "nonzero": 5, "file_bytes": 40, "memory_bytes": 10**8}
    model |= {"prefill_seconds": {"1": 0.2}, "decode_seconds": {"1": 0.02}}
    result = {
        "settings": {"batches": [1], "prompt": 128, "new": 32, "repeat": 5, "device": "cpu"},
        "hardware": {"threads": 2},
        "models": [model, model | {"nonzero": 10}],
        "faster": {"prefill": {"1": 1.25}, "decode": {"1": 1.5}},
        "spread": {"prefill": {"1": [1.2, 1.3]}, "decode": {"1": [1.4, 1.6]}},
    }
    lines = {what: rest for what, *rest in bench_rows(result)}
    assert lines["of them not zero"] == ["5", "10", "0.500"]
    assert lines["prefill of 128 tokens, batch 1"] == ["200.0 ms", "200.0 ms", "1.25 x as fast (1.20 to 1.30)"]
    assert {len(row) for row in bench_rows(result)} == {4}
    monkeypatch.setattr("sparsekit.results.bench", lambda *_, **__: result)
    assert cli.main(["bench", str(tmp_path), "--save"]) == 2  # said before anything is measured
    (tmp_path / "report.json").write_text(json.dumps({"recipe": {"model": {"path": "m"}}, "verified": True}))
    assert cli.main(["bench", str(tmp_path), "--save"]) == 0
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["speed"] == result and kept["verified"] is True
    assert "1.25 x as fast" in (tmp_path / "report.html").read_text(encoding="utf-8")


# Text samples


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_samples_are_the_likeliest_tokens(models: Path, name: str) -> None:
    model, tokenizer = load_plain(models / name)
    model.train()
    found = samples(model, tokenizer, ["The function returns", "class Point:"], 6)
    assert model.training
    model.eval()
    for prompt, said in zip(["The function returns", "class Point:"], found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):  # without a cache
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        assert said == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_samples_end_where_positions_do(models: Path) -> None:
    model, tokenizer = load_plain(models / "tiny-llama")
    positions = model.config.max_position_embeddings
    with pytest.raises(ValueError, match="give a prompt of at least one token that leaves room"):
        samples(model, tokenizer, ["word " * positions], 4)
    assert len(samples(model, tokenizer, length=2)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("backend", "needs", "times"),
    [
        pytest.param("compiled", [], {"prefill", "decode"}, marks=pytest.mark.long),
        ("onnxruntime", ["onnx", "onnxscript", "onnxruntime"], {"prefill"}),
        ("openvino", ["openvino"], {"prefill"}),
    ],
)
def test_a_model_is_measured_in_other_runtimes(
    backend: str, needs: list[str], times: set[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: make test-clients")
    if backend == "compiled" and not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    path, file = str(models / "tiny-llama"), tmp_path / "bench.json"
    sizes = ["--prompt", "8", "--new", "2", "--repeat", "1", "--json", str(file)]
    assert cli.main(["bench", path, "--against", path, "--backend", backend, "--batch", "1", "2", *sizes]) == 0
    result = json.loads(file.read_text())
    assert set(result["faster"]) == times
    assert all(("memory_bytes" in model) == (backend == "compiled") for model in result["models"])
    assert all(model["prefill_seconds"]["2"] > 0 and model["file_bytes"] > 0 for model in result["models"])
    assert all(name in result["versions"] for name in needs)
    assert f"in {backend} on cpu" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp) is not installed")
def test_a_model_is_measured_in_llama_cpp(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    file, path = tmp_path / "b.json", str(models / "tiny-llama")
    sizes = ["--prompt", "16", "--new", "4", "--repeat", "2"]
    command = ["bench", path, "--against", path, "--backend", "llama.cpp", "--precision", "f16", *sizes]
    assert cli.main([*command, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    one, two = result["models"]
    assert result["settings"]["backend"] == "llama.cpp" and "xllamacpp" in result["versions"]
    assert one["file_bytes"] == two["file_bytes"] < 1.2 * one["parameters"] * 2
    assert one["decode_seconds"]["1"] > 0 and set(result["faster"]["decode"]) == {"1"}
    assert "in llama.cpp on cpu" in " ".join(capsys.readouterr().out.split())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--backend", "llamacpp"],
            "backend is 'llamacpp'; it can be transformers, compiled",
        ),
        (["--backend", "llama.cpp", "--precision", "q9"], "precision is 'q9'; it can be source, f32"),
        (["--precision", "f16"], "precision f16 is for llama.cpp: give --backend llama.cpp"),
        (
            ["--backend", "semi-structured"],
            "is for CUDA, whose tensor cores multiply 2:4, and not for cpu",
        ),
        (["--backend", "llama.cpp", "--batch", "2"], "one sequence at a time is measured: give --batch 1"),
        (["--backend", "llama.cpp", "--perplexity", "python-docs"], "quality is measured in transformers"),
    ],
)
def test_what_a_backend_does_not_do(
    more: list[str], said: str, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekit.results.backends.version", lambda name: "1")
    assert cli.main(["bench", str(models / "tiny-llama"), *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
