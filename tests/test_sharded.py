"""Recovery with what is trained divided among processes: the same as with the whole of it in each."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsekit.cli import main
from sparsekit.model import find_blocks
from sparsekit.system import Team
from sparsekit.testing import tiny_experts, tiny_model
from sparsekit.train.sharded import Sharding

TINY = Path(__file__).parent / "models" / "tiny-llama"
RECIPE = """\
model: {model}
pattern: "2:4"
calibration: {{source: python-docs, samples: 8, length: 32}}
evaluate: {{samples: false}}
loggers: []
stages: [magnitude, {stage}]
trainer: {{accelerator: cpu, devices: 2, strategy: {strategy}}}
output: {output}
"""
STAGES = {
    "finetune": "{finetune: {steps: 12, length: 32, batch: 2, accumulate: 2, validation: 0.1, weight_decay: 0.1}}",
    "checkpointed": "{finetune: {steps: 8, length: 32, batch: 2, validation: 0.1, checkpointing: true}}",
    "lora": "{lora: {rank: 4, steps: 12, length: 32, batch: 2, norms: true, validation: 0.1}}",
    "distilled": "{lora: {rank: 4, steps: 8, length: 32, batch: 2, variant: prune, distill: 0.5, validation: 0.1}}",
}
# a checkpoint after every step; the process ends at once, as by kill -9, after the step that STOP says
STOPPING = """\
import os, sys, time
from sparsekit.cli import main
from sparsekit.train import Checkpoints, checkpoints

begin, end = Checkpoints.on_train_batch_end, int(os.environ.get("STOP", -1))
checkpoints.PAUSE = 0

def stopping(self, trainer, *rest):
    self.pause = 0
    print("at step", trainer.global_step, flush=True)
    begin(self, trainer, *rest)
    if trainer.global_step == end:
        time.sleep(3)  # the other has its checkpoint too
        os._exit(9)

Checkpoints.on_train_batch_end = stopping
sys.exit(main())
"""


def fit(
    folder: Path, stage: str, strategy: str, more: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    (folder / "stopping.py").write_text(STOPPING)
    file = folder / f"{strategy}.yaml"
    file.write_text(RECIPE.format(model=TINY, stage=STAGES[stage], strategy=strategy, output=folder / strategy))
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(folder / "stopping.py"), "fit", "--recipe", str(file), *more]
    return subprocess.run(command, capture_output=True, text=True, env=settings)


def compared(folder: Path, one: str, other: str) -> float:
    """The largest difference of two results' weights; their zeros are the same."""
    first, second = (load_file(folder / name / "model" / "model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name] == 0, second[name] == 0) for name in first)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "stage", [*STAGES][:1] + [pytest.param(each, marks=pytest.mark.long) for each in [*STAGES][1:]]
)
def test_shares_learn_what_the_whole_model_learns(stage, tmp_path):
    for strategy in ("ddp", "fsdp"):
        done = fit(tmp_path, stage, strategy)
        assert done.returncode == 0, done.stderr
    assert compared(tmp_path, "ddp", "fsdp") < 1e-4
    name = "lora" if "lora" in STAGES[stage] else "finetune"
    notes = [json.loads((tmp_path / each / "report.json").read_text())["notes"][name] for each in ("ddp", "fsdp")]
    assert notes[0]["after"] < notes[0]["before"] and abs(notes[0]["after"] - notes[1]["after"]) < 1e-4


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_from_both_processes_checkpoints(tmp_path):
    whole = fit(tmp_path, "finetune", "fsdp")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "fsdp").rename(tmp_path / "whole")
    killed = fit(tmp_path, "finetune", "fsdp", STOP="7")
    assert killed.returncode != 0
    folders = sorted((tmp_path / "fsdp").rglob("*-of-2"))
    assert [folder.name for folder in folders] == ["1-of-2", "2-of-2"]
    sizes = [next(folder.glob("7.ckpt")).stat().st_size for folder in folders]
    assert max(sizes) < 1.2 * min(sizes)  # a share each
    again = fit(tmp_path, "finetune", "fsdp", more=["--resume"])
    assert again.returncode == 0, again.stderr
    begun = [int(step) for step in re.findall(r"at step (\d+)", again.stdout)]
    assert begun and min(begun) >= 6
    assert compared(tmp_path, "whole", "fsdp") < 1e-6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["trainer.devices=1"], "trainer.strategy is fsdp, which divides a model among processes: give 2 or more"),
        ([f"model={TINY.with_name('tiny-moe')}"], "model.layers.0, whose experts lie in one parameter; give strategy"),
        (["stages=[magnitude]"], "trainer.strategy is fsdp, which is for lora and finetune, and no stage is one"),
    ],
)
def test_where_there_is_nothing_to_divide_it_is_said_in_advance(settings, said, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=TINY, stage=STAGES["lora"], strategy="fsdp", output=tmp_path / "run")
    file.write_text(text)
    assert main(["fit", "--recipe", str(file), "--dry-run", "--set", *settings]) == 2
    assert said in capsys.readouterr().err


def test_experts_and_what_is_outside_the_blocks_are_refused():
    model = tiny_experts()
    with pytest.raises(ValueError, match="whose experts lie in one parameter; give strategy: ddp"):
        Sharding(model, find_blocks(model), {}, Team(0, 2))
    model = tiny_model()
    with pytest.raises(ValueError, match=r"lm_head\.weight is outside them"):
        Sharding(model, find_blocks(model), {"lm_head.weight": model.lm_head.weight}, Team(0, 2))
