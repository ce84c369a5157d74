"""Memory that a recipe needs, and budgets of it."""

from pathlib import Path

import pytest
import torch

import sparsekit
from sparsekit.cli import main
from sparsekit.recipe import load_recipe
from sparsekit.run import make_plan


def _recipe(tmp_path: Path, models: Path, **more: object) -> Path:
    settings = {
        "model": models / "tiny-llama",
        "pattern": '"2:4"',
        "stages": "[sparsegpt]",
        "calibration": "{source: python-docs, samples: 64, length: 64}",
        "output": tmp_path / "run",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in (settings | more).items()))
    return file


def _plan(tmp_path: Path, models: Path, **more: object):
    return make_plan(load_recipe(_recipe(tmp_path, models, **more)))


def test_wanda_needs_no_gram_and_less_than_others(tmp_path: Path, models: Path) -> None:
    totals = []
    for stages in ("[wanda]", "[sparsegpt]", "[alps]", "[wanda, fista]"):
        (parts,) = _plan(tmp_path, models, stages=stages).needs.values()
        assert (parts["Gram matrices that are left"] == 0) == (stages == "[wanda]")
        totals.append(sum(parts.values()))
    assert totals == sorted(totals)


def test_a_second_block_and_a_training_are_counted(tmp_path: Path, models: Path) -> None:
    planned = _plan(tmp_path, models, error_correction="model")
    (parts,) = planned.needs.values()
    assert parts["a block, twice"] == 8 * parts["its masks"]  # float32, two copies; a byte a weight
    (parts,) = _plan(tmp_path, models, stages="[lamp]").needs.values()
    assert parts["training it"] == 21 * parts["its masks"] and "Gram matrices that are left" not in parts


def test_a_backward_pass_that_allocates_is_counted(tmp_path: Path, models: Path) -> None:
    """tiny-llama: 64 wide, 160 in the MLP, float32."""
    more = {"pattern": '"50%"', "allocation": "sensitivity", "stages": "[wanda]"}
    allocating, _ = _plan(tmp_path, models, **more).needs.values()
    assert allocating["its Gram matrices"] == 4 * (3 * 64**2 + 160**2)
    assert allocating["the linear that is weighed"] == 24 * 64 * 160
    assert allocating["a sequence's way through it and back"] == 64 * 4 * (
        3 * 64 + 160 + 3 * (64 + 32 + 32 + 64 + 2 * 160 + 64)
    )
    assert len(_plan(tmp_path, models, **more | {"allocation": "owl"}).needs) == 1


def test_a_budget_gives_activations_what_is_left(tmp_path: Path, models: Path) -> None:
    assert _plan(tmp_path, models).memory == (4 * 10**9, 4 * 10**9)
    planned = _plan(tmp_path, models, memory="{budget: 1GB}")
    (parts,) = planned.needs.values()
    assert planned.memory[0] == 10**9 - sum(parts.values())
    assert _plan(tmp_path, models, memory="{budget: 1GB, activations: 1MB}").memory[0] == 10**6
    several = _plan(tmp_path, models, model=models / "tiny-moe", memory="{budget: 1GB}")
    assert several.memory[0] == several.memory[1] == (10**9 - sum(next(iter(several.needs.values())).values())) // 2


def test_a_budget_that_cannot_be_kept_is_refused_with_the_smallest(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _recipe(tmp_path, models, memory="{budget: 500MB}")
    assert main(["fit", "--recipe", str(file), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "memory.budget is 500.0 MB, and sparsegpt needs 6" in said
    assert not (tmp_path / "run").exists()


def test_a_model_in_memory_has_no_budget(models: Path) -> None:
    model, _ = sparsekit.load(models / "tiny-llama")
    tokens = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="this one is in memory"):
        sparsekit.prune(model, pattern="2:4", stages=["wanda"], calibration=tokens, memory={"budget": "4GB"})


@pytest.mark.parametrize(("given", "said"), [("lots", '"4GB", "512MB" or "4GiB"'), ("0", "greater than 0")])
def test_a_budget_that_is_none(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], given, said) -> None:
    assert (
        main(["fit", "--recipe", str(_recipe(tmp_path, models)), "--dry-run", "--set", f"memory.budget={given}"]) == 2
    )
    assert said in capsys.readouterr().err


def test_a_dry_run_tells_the_memory_of_every_stage(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _recipe(tmp_path, models, stages="[wanda, {lora: {steps: 2}}]", memory="{budget: 2GB}")
    assert main(["fit", "--recipe", str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "memory of wanda: " in said and "process 600.0 MB" in said
    assert "memory of lora: as much as the whole model needs" in said
    with pytest.warns(UserWarning, match="lora is given the model as a whole and not held to it"):
        make_plan(load_recipe(file))
