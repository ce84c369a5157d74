"""lm-eval's own command over what is pruned and cut: the figures that `evaluate.tasks` gives of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import sparsekit
from sparsekit.measure.tasks import local_task
from tests.clients.test_others import cut, pruned
from tests.clients.test_transformers import cut as unequal

DOCUMENTS = 24


def asked(folder: Path) -> dict[str, Any]:
    """A task of two choices over words of the vocabulary, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    words = ["list", "tuple", "string", "number", "function", "class", "loop", "file"]
    lines = []
    for _ in range(DOCUMENTS):
        first, second, third = (words[int(n)] for n in torch.randperm(len(words), generator=generator)[:3])
        lines.append(json.dumps({"text": f"A {first} is like a", "choices": [second, third], "label": len(lines) % 2}))
    file = folder / "asked.jsonl"
    file.write_text("\n".join(lines))
    prompt = {"prompt": "{{text}}", "choices": "{{choices}}", "label": "{{label}}"}
    return {"name": "asked", "path": str(file), **prompt}


def by_command(model: Path, entry: dict[str, Any], folder: Path) -> dict[str, float]:
    """What the command writes."""
    tasks = folder / "tasks"
    tasks.mkdir()
    with (tasks / "asked.yaml").open("w") as file:
        YAML().dump({**local_task(entry), "num_fewshot": 0}, file)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "asked", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(tasks)]
    command += ["--trust_remote_code", "--output_path", str(folder / "told"), "--batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    [told] = (folder / "told").rglob("results_*.json")
    found: dict[str, float] = json.loads(told.read_text())["results"]["asked"]
    return found


@pytest.mark.parametrize("made", ["2:4", "cut", "unequal"])
def test_the_command_says_the_same(made: str, tmp_path: Path) -> None:
    folders = {
        "2:4": lambda: pruned("Llama", tmp_path / "result"),
        "cut": lambda: cut("Qwen2", tmp_path / "result"),
        "unequal": lambda: unequal(tmp_path / "result"),
    }
    model, entry = folders[made](), asked(tmp_path)
    ours = sparsekit.evaluate(*sparsekit.load(model), tasks=[entry])
    told = by_command(model, entry, tmp_path)
    for metric in ("acc", "acc_norm"):
        assert ours[f"asked {metric}"].value == pytest.approx(told[f"{metric},none"], abs=1e-9)
        assert 0 < told[f"{metric},none"] < 1
