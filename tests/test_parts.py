"""Models of an encoder and a decoder, and what blocks give to later ones beside hidden states."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.cli import main
from sparsekit.model import (
    Weights,
    adopt,
    discover,
    filled,
    find_blocks,
    load,
    load_resting,
    parts_of,
    settle,
    skeleton,
)
from sparsekit.walk import BlockStream, Commits, check_walk

Tiny = Callable[[str], Path]
TEXT = torch.randint(5, 90, (3, 24), generator=torch.Generator().manual_seed(0))


def _resting(folder: Path) -> tuple[Any, list[Any]]:
    bare: Any = skeleton(folder)
    bare.to(torch.bfloat16)
    model = load_resting(folder)
    return model, adopt(model, discover(bare, torch.zeros(1, 8, dtype=torch.long, device="meta")))


def _recipe(tmp_path: Path, source: Path, **more: object) -> list[str]:
    settings = {
        "model": source,
        "pattern": '"2:4"',
        "stages": "[sparsegpt]",
        "calibration": "{source: python-docs, samples: 4, length: 32}",
        "evaluate": "{samples: false}",
        "output": tmp_path / "run",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in (settings | more).items()))
    return ["fit", "--recipe", str(file)]


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_the_walk_is_the_models_own_forward_pass(tiny: Tiny, name: str) -> None:
    model, blocks = _resting(tiny(f"two/{name}"))
    assert len(parts_of(blocks)) == 2
    assert [block.index for block in blocks] == list(range(len(blocks)))
    check_walk(model, blocks, TEXT)


@pytest.mark.parametrize("name", ["zaya", "hy_v4"])
def test_what_blocks_give_to_later_ones_is_carried(tiny: Tiny, name: str) -> None:
    model, blocks = _resting(tiny(name))
    check_walk(model, blocks, TEXT)
    assert blocks[0].carried.passed


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_is_given_what_the_pruned_encoder_gives(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """The oracle is the library's own pass of the model with the encoder's weights changed."""
    model, blocks = _resting(tiny(f"two/{name}"))
    whole: Any = load(tiny(f"two/{name}"))[0]
    first = parts_of(blocks)[1][0]
    commits = Commits(tmp_path / "blocks", Weights(tmp_path / "weights", model))
    commits.prepare(blocks)
    stream = BlockStream.over(model, blocks, TEXT, batch=2, commits=commits)
    for block in stream:
        assert block is not None
        if block is first:
            break
        for linear in block.linears.values():
            linear.write(linear.weight * 0.5)
        stream.advance(block)
        block.masks = {name: linear.weight != 0 for name, linear in block.linears.items()}
        commits.commit(block)
        settle(block, commits.weights.stored)
    for block in find_blocks(whole)[: first.index]:
        for linear in block.linears.values():
            linear.write(linear.weight * 0.5)
    seen: list[torch.Tensor] = []
    own = whole.get_submodule(first.name)
    own.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for chunk in TEXT.split(2):
        whole(input_ids=chunk, decoder_input_ids=chunk)
    with filled([first]):
        for chunk, expected in zip(stream.inputs, seen, strict=True):
            torch.testing.assert_close(first(chunk), expected, rtol=1e-4, atol=1e-4)


def test_one_part_can_be_left_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("two/bart")
    assert main(_recipe(tmp_path, source, targets="[decoder]")) == 0
    dense, pruned = load(source)[0], load(tmp_path / "run" / "model")[0]
    for before, after in zip(find_blocks(dense), find_blocks(pruned), strict=True):
        for name, linear in after.linears.items():
            same = torch.equal(linear.weight, before.linears[name].weight)
            assert same == (".encoder." in name), name
            zeros = (linear.weight == 0).float().mean()
            assert float(zeros) == (0.5 if ".decoder." in name else 0.0), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stages": "[lamp]"}, "stage 1, `lamp`, needs the dense outputs"),
        ({"error_correction": "model"}, "error_correction model is not for it, give prefix"),
        ({"allocation": "owl", "pattern": '"50%"'}, "allocation by owl needs the dense model, give uniform"),
        ({"stages": "[wanda, lora]"}, "`lora`, is for causal language models"),
    ],
)
def test_what_needs_the_dense_model_is_refused_in_advance(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, object], said: str
) -> None:
    assert main([*_recipe(tmp_path, tiny("two/bart"), **more), "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_in_two_processes_too(tiny: Tiny, tmp_path: Path) -> None:
    """The decoder's weights are solved for what the pruned encoder gives in every process."""
    pruned = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        trainer = f"{{accelerator: cpu, devices: {devices}}}"
        command = _recipe(folder, tiny("two/bart"), pattern='"75%"', trainer=trainer)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "sparsekit", *command], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        pruned.append(load(folder / "run" / "model")[0].state_dict())
    one, two = pruned
    for name in one:
        if ".decoder.layers." in name and one[name].dim() == 2:
            apart = float((one[name] - two[name]).norm() / one[name].norm())
            assert apart < 0.02, (name, apart)


@pytest.mark.parametrize("stages", ["wanda, lora", "wanda, finetune", "{wanda-sp: {remove: 20%}}, wanda"])
def test_what_learns_or_cuts_is_not_for_encoders(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str
) -> None:
    assert main([*_recipe(tmp_path, tiny("masked/modernbert"), stages=f"[{stages}]"), "--dry-run"]) == 2
    assert "is for causal language models" in " ".join(capsys.readouterr().err.split())
