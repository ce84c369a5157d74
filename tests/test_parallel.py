"""Several processes work together: the same bits with error_correction block, else the same sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import SETTINGS, build
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sparsekit.maths import Stats
from sparsekit.model import discover
from sparsekit.system import Team
from sparsekit.walk import BlockStream

TINY = Path(__file__).parent / "models" / "tiny-llama"
RECIPE = """\
model: {model}
pattern: "2:4"
calibration: {{source: python-docs, samples: 16, length: 32}}
error_correction: {mode}
stages: [sparsegpt, refit]
trainer: {{accelerator: cpu, devices: {devices}}}
output: {output}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Three blocks, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("model")
    build("GPT2", settings=SETTINGS["GPT2"] | {"vocab_size": 1024}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, mode: str, devices: int) -> Path:
    file = folder / f"{mode}{devices}.yaml"
    file.write_text(RECIPE.format(model=model, mode=mode, devices=devices, output=folder / file.stem))
    return file


def fit(file: Path, *more: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*launcher, "-m", "sparsekit", "fit", "--recipe", str(file), *more]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model) -> dict[str, torch.Tensor]:
    """What one process makes of the model."""
    folder = tmp_path_factory.mktemp("alone")
    done = fit(recipe(folder, model, "block", 1))
    assert done.returncode == 0, done.stderr
    return weights(folder / "block1")


def test_blocks_in_two_processes_are_bit_for_bit_those_of_one(tmp_path, model, alone):
    done = fit(recipe(tmp_path, model, "block", 2))
    assert done.returncode == 0, done.stderr
    two = weights(tmp_path / "block2")
    assert two.keys() == alone.keys()
    assert all(torch.equal(two[name], alone[name]) for name in two)
    report = json.loads((tmp_path / "block2" / "report.json").read_text())
    assert report["verified"] is True and len(report["error"]) == 12
    assert len((tmp_path / "block2" / "metrics.csv").read_text().split()) == 4  # a head and three blocks


@pytest.mark.parametrize("mode", ["prefix", pytest.param("model", marks=pytest.mark.long)])
def test_sums_over_two_processes_are_those_of_one_up_to_rounding(mode, tmp_path):
    """On a trained model, with tokens enough and a solver without a stop rule: little is on the edge of a decision."""
    for devices in (1, 2):
        done = fit(recipe(tmp_path, TINY, mode, devices), "--set", "stages=[sparsegpt]")
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / f"{mode}1"), weights(tmp_path / f"{mode}2")
    moved = sum(int(((two[name] != 0) != (one[name] != 0)).sum()) for name in two)
    assert moved <= 1e-4 * sum(weight.numel() for weight in two.values())
    for name, weight in two.items():
        close = (weight - one[name]).abs() < 1e-4 * one[name].abs().max()
        assert close.float().mean() > 0.999, name


@pytest.mark.parametrize(
    ("stage", "apart"), [("sparsellm: {epochs: 2}", 0.02), ("lamp: {epochs: 4, solver: wanda}", 0.1)]
)
def test_stages_with_a_loop_of_their_own_share_their_work(stage, apart, tmp_path):
    """Errors of the blocks as one process makes them; lamp's steps are other ones, as each process draws its own."""
    errors = []
    for devices in (1, 2):
        done = fit(recipe(tmp_path, TINY, "prefix", devices), "--set", f"stages=[{{{stage}}}]")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / f"prefix{devices}" / "report.json").read_text())
        assert report["verified"] is True
        errors.append(sum(report["error"].values()) / len(report["error"]))
    assert abs(errors[1] / errors[0] - 1) < apart, errors


def test_a_killed_process_ends_the_others_and_one_alone_goes_on(tmp_path, model, alone):
    script = tmp_path / "die.py"
    script.write_text(
        "import os, signal, sys\n"
        "from sparsekit import cli\n"
        "from sparsekit.walk import commits\n"
        "whole = commits.Commits.commit\n"
        "def commit(self, block):\n"
        "    if os.environ.get('LOCAL_RANK') == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(self, block)\n"
        "commits.Commits.commit = commit\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    file = recipe(tmp_path, model, "block", 2)
    command = [sys.executable, str(script), "fit", "--recipe", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    committed = {path.name for path in (tmp_path / "block2" / "blocks").glob("*.safetensors")}
    assert "00001.safetensors" not in committed  # that of the process that died
    done = fit(file, "--resume", "--set", "trainer.devices=1")
    assert done.returncode == 0, done.stderr
    two = weights(tmp_path / "block2")
    assert all(torch.equal(two[name], alone[name]) for name in two)


def test_torchrun_starts_the_processes_too(tmp_path, model, alone):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = fit(recipe(tmp_path, model, "block", 2), launcher=torchrun)
    assert done.returncode == 0, done.stderr
    two = weights(tmp_path / "block2")
    assert all(torch.equal(two[name], alone[name]) for name in two)


def test_more_processes_than_sequences_are_refused():
    model = build("Llama")
    with pytest.raises(ValueError, match="2 sequences cannot be shared out to 3 processes"):
        BlockStream.over(model, [], torch.zeros(2, 8, dtype=torch.long), team=Team(0, 3))


def test_rounds_leave_no_block_out_and_none_twice():
    for size in (1, 2, 3, 4, 5):
        model = build("GPT2")
        found = discover(model, torch.zeros(1, 4, dtype=torch.long))
        tokens = torch.zeros(2, 4, dtype=torch.long)
        streams = [
            BlockStream.over(model, found, tokens, error_correction="block", team=Team(rank, size))
            for rank in range(size)
        ]
        assert len({len(stream) for stream in streams}) == 1  # Lightning meets in every round
        turns = [block.index for stream in streams for block in stream.rounds if block is not None]
        assert sorted(turns) == [block.index for block in found]


def test_parts_add_up_to_the_statistics_of_all_tokens():
    torch.manual_seed(0)
    inputs, dense = torch.randn(64, 520, dtype=torch.float64), torch.randn(64, 520, dtype=torch.float64)
    whole = Stats.of(inputs, dense)
    one, two = Stats.of(inputs[:20], dense[:20]), Stats.of(inputs[20:], dense[20:])
    one.gram, two.gram  # noqa: B018 (mirrored before they are added)
    for mine, other in zip(one.parts(), two.parts(), strict=True):
        mine += other
    assert torch.allclose(one.gram, whole.gram) and torch.allclose(one.mean, whole.mean)
    assert torch.allclose(one.cross, whole.cross) and torch.allclose(one.dense_gram, whole.dense_gram)
    assert one.count == whole.count == 64


def test_work_is_shared_out_evenly_and_to_someone():
    costs = {"q": 3.0, "k": 1.0, "v": 1.0, "o": 3.0, "gate": 8.0, "up": 8.0, "down": 20.0}
    owners = Team(0, 2).owners(costs)
    assert owners.keys() == costs.keys()
    load = [sum(costs[name] for name in owners if owners[name] == rank) for rank in (0, 1)]
    assert max(load) == 22.0
    assert set(Team().owners(costs).values()) == {0}


def test_two_processes_learn_the_same_structure_as_one(tmp_path):
    """They share the sequences of each step, and draw the same masks."""
    stage = '{policy_gradient: {remove: "30%", steps: 6, batch: 4, length: 32, group: 16, compensate: false}}'
    notes = {}
    for devices in (1, 2):
        file = tmp_path / f"{devices}.yaml"
        file.write_text(
            f"model: {TINY}\ncalibration: {{source: python-docs, samples: 16, length: 32}}\nstages: [{stage}]\n"
            f"trainer: {{accelerator: cpu, devices: {devices}}}\noutput: {tmp_path / str(devices)}\n"
        )
        done = fit(file)
        assert done.returncode == 0, done.stderr
        notes[devices] = json.loads((tmp_path / str(devices) / "report.json").read_text())["notes"]["policy_gradient"]
    one, two = (torch.tensor(notes[devices]["curve"]) for devices in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert notes[1]["held_out"] == pytest.approx(notes[2]["held_out"], rel=1e-4)
    shapes = [(tmp_path / name / "model" / "structure.json").read_text() for name in "12"]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "recovery", [pytest.param("lora: {rank: 4, ", marks=pytest.mark.long), "finetune: {distill: 0.5, cache: 8, "]
)
def test_two_processes_recover_as_one_does_with_batches_twice_as_large(recovery, tmp_path):
    """They share the rows of each batch and average their gradients; all know what the others pruned."""
    found = {}
    for devices in (1, 2):
        stage = f"{{{recovery}steps: 4, batch: {4 // devices}, length: 32, learning_rate: 1.0e-3, checks: 2}}}}"
        file = tmp_path / f"{devices}.yaml"
        file.write_text(
            f'model: {TINY}\npattern: "2:4"\ncalibration: {{source: python-docs, samples: 16, length: 32}}\n'
            f"error_correction: block\nstages: [wanda, {stage}, {{quantize: {{bits: 8, group: 32}}}}]\n"
            f"trainer: {{accelerator: cpu, devices: {devices}}}\noutput: {tmp_path / str(devices)}\n"
        )
        done = fit(file)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / str(devices) / "report.json").read_text())
        assert report["verified"] is True
        found[devices] = report["notes"][recovery.partition(":")[0]], weights(tmp_path / str(devices))
    (one, alone), (two, shared) = found[1], found[2]
    assert one["tokens"] == two["tokens"] and one["after"] < one["before"]
    curves = (torch.tensor([[value or 0.0 for value in point] for point in note["curve"]]) for note in (one, two))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-4)
    zeros = {name: weight == 0 for name, weight in alone.items() if "_proj" in name}
    near = [torch.isclose(alone[name], shared[name], atol=2e-2).float().mean() for name in zeros]
    assert min(near) > 0.99  # on the grid, where a rounding may fall to the other side
