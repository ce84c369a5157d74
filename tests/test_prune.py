"""The Python door: a model in memory goes the way of the command line."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from test_run import TINY, fit, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekit
from sparsekit import cli
from sparsekit.contracts import StageError
from sparsekit.maths import NM
from sparsekit.run import Result
from sparsekit.walk import Commits

TOKENS = torch.randint(1, 700, (8, 32), generator=torch.Generator().manual_seed(0))
TEXT = [
    f"The {word} statement is used to {word} a name, and it raises an error if it cannot." * 3 for word in "abcdefgh"
]
SECTION = {"source": "python-docs", "samples": 8, "length": 64}


def loaded() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(tensor, own) for (name, tensor), (twin, own) in pairs)


@pytest.mark.parametrize("stages", [["sparsegpt"], [{"lamp": {"epochs": 1}}]], ids=["sparsegpt", "lamp"])
def test_the_bits_are_those_of_the_command_line(stages: list[Any], tmp_path: Path) -> None:
    file = recipe(tmp_path)
    done = fit(file, "--set", f"stages={json.dumps(stages)}", "evaluate={}")
    assert done.returncode == 0, done.stderr
    model, tokenizer = loaded()
    result = sparsekit.prune(model, tokenizer, pattern="2:4", stages=stages, calibration=SECTION)
    assert result.model is model and same(model, sparsekit.load(tmp_path / "run")[0])
    masks = sparsekit.masks(tmp_path / "run")
    assert masks.keys() == result.masks.keys()
    assert all(torch.equal(masks[name], kept) and NM(2, 4).satisfied(kept) for name, kept in result.masks.items())
    assert result.verified and result.report["sparsity"]["total"] == pytest.approx(0.5, abs=1e-4)


def test_saved_it_is_a_run_and_is_proved_from_disk(tmp_path: Path, capsys: Any) -> None:
    model, tokenizer = loaded()
    result = sparsekit.prune(model, tokenizer, pattern="50%", stages=["wanda", {"refit": {}}], calibration=TEXT)
    folder = result.save(tmp_path / "saved")
    assert result.verify() == []
    command = ["verify", str(folder), "--pattern", "50%", "--against", str(TINY)]
    assert cli.main(command) == 0
    assert same(AutoModelForCausalLM.from_pretrained(folder / "model"), model)
    assert json.loads((folder / "report.json").read_text())["verified"] is True
    with pytest.raises(ValueError, match="is not empty"):
        result.save(folder)
    again = Result(folder)
    assert again.verified and same(again.model, model) and again.masks.keys() == result.masks.keys()


def test_a_block_is_solved_group_after_group() -> None:
    """error_correction: sequential, the option true-sequential of SparseGPT's and GPTQ's code."""
    answers = {}
    for mode in ("prefix", "sequential"):
        model, tokenizer = loaded()
        settings: dict[str, Any] = {"pattern": "2:4", "stages": ["sparsegpt"], "calibration": TOKENS}
        result = sparsekit.prune(model, tokenizer, error_correction=mode, **settings)
        assert result.verified
        answers[mode] = result.masks
    first = [name for name in answers["prefix"] if ".layers.0." in name]
    same_masks = {name.rpartition(".")[2] for name in first if torch.equal(*(answers[mode][name] for mode in answers))}
    assert same_masks == {"q_proj", "k_proj", "v_proj"}  # what enters the others depends on what is pruned before


def test_damage_after_pruning_is_seen(tmp_path: Path) -> None:
    model, tokenizer = loaded()
    result = sparsekit.prune(model, tokenizer, pattern="2:4", stages=["magnitude"], calibration=TOKENS)
    assert result.verify() == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(-1)[:4] = 1.0
        model.model.embed_tokens.weight[3, 3] += 1
    said = " ".join(result.verify())
    assert "up_proj has weights where its mask says zero" in said and "up_proj has" in said
    assert "embed_tokens.weight is not what it was" in said
    with pytest.raises(ValueError, match="is not as asked"):
        result.save(tmp_path / "saved")


def test_a_copy_leaves_the_model_alone() -> None:
    model, tokenizer = loaded()
    before = copy.deepcopy(model)
    result = sparsekit.prune(model, tokenizer, pattern="2:4", stages=["wanda"], calibration=TOKENS, copy=True)
    assert same(model, before) and result.model is not model and not same(result.model, before)


def test_every_form_of_calibration() -> None:
    answers = []
    rows = datasets.Dataset.from_dict({"text": TEXT})
    for calibration in (TEXT, rows, tuple(TEXT)):
        model, tokenizer = loaded()
        sparsekit.prune(model, tokenizer, pattern="2:4", stages=["wanda"], calibration=calibration)
        answers.append(model)
    assert same(answers[0], answers[1]) and same(answers[0], answers[2])
    model, _ = loaded()
    sparsekit.prune(model, pattern="2:4", stages=["wanda"], calibration=TOKENS)  # no tokenizer


def test_structures_and_recovery(tmp_path: Path) -> None:
    model, tokenizer = loaded()
    lora = {"lora": {"steps": 3, "length": 32, "batch": 2, "checks": 1}}
    stages = [{"wanda-sp": {"remove": "30%"}}, "wanda", lora]
    result = sparsekit.prune(model, tokenizer, pattern="2:4", stages=stages, calibration=SECTION)
    assert result.verify() == [] and result.report["structure"]["total"] >= 0.3
    result.save(tmp_path / "saved")
    assert same(sparsekit.load(tmp_path / "saved")[0], model)


def test_a_killed_call_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    whole, tokenizer = loaded()
    settings: dict[str, Any] = {"pattern": "2:4", "stages": ["sparsegpt"], "calibration": TOKENS}
    sparsekit.prune(whole, tokenizer, **settings)
    real, done = Commits.commit, []

    def commit(self: Any, block: Any) -> None:
        if len(done) == 2:
            raise OSError("no space left")
        done.append(block.index)
        real(self, block)

    model, _ = loaded()
    with monkeypatch.context() as patch:
        patch.setattr(Commits, "commit", commit)
        with pytest.raises(OSError, match="no space left"):
            sparsekit.prune(model, tokenizer, resume=tmp_path / "kept", **settings)
    other, _ = loaded()
    with pytest.raises(ValueError, match="cannot be resumed"):
        sparsekit.prune(other, tokenizer, resume=tmp_path / "kept", **settings | {"pattern": "4:8"})
    again, _ = loaded()
    result = sparsekit.prune(again, tokenizer, resume=tmp_path / "kept", **settings)
    assert same(again, whole) and result.verified


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": None}, "missing key `pattern`"),
        ({"stages": ["wandaa"]}, "did you mean `wanda`"),
        ({"stages": [{"sparsegpt": {"damping": -1}}]}, "option `damping` is -1, must be at least 0"),
        ({"pattern": "2:5"}, "model.layers.0.self_attn.q_proj"),
        ({"calibration": TOKENS.float()}, "give token ids"),
        ({"calibration": TOKENS + 5000}, "they do not fit"),
        ({"calibration": []}, "calibration is a list"),
        ({"calibration": 3}, "calibration is a int"),
        ({"calibration": {"source": "python-dogs"}}, "did you mean `python-docs`"),
        ({"evaluate": {}}, "prune takes no evaluate"),
        ({"error_correction": "intra"}, "error_correction"),
        ({"stages": ["wanda", {"lora": {"distill": 0.5, "source": "python-docs", "steps": 1}}]}, "copy=True"),
        ({"stages": ["wanda", {"lora": {"steps": 1}}]}, "give it a `source`"),
    ],
)
def test_mistakes(settings: dict[str, Any], said: str) -> None:
    model, tokenizer = loaded()
    given = {"pattern": "2:4", "stages": ["wanda"], "calibration": TOKENS} | settings
    with pytest.raises(ValueError, match=said):
        sparsekit.prune(model, tokenizer, **given)


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="a model of transformers that is in memory, not a str"):
        sparsekit.prune("tiny-llama", stages=["wanda"], calibration=TOKENS)  # type: ignore[arg-type]


def test_fit_takes_a_mapping_and_a_file(tmp_path: Path) -> None:
    given = {
        "model": str(TINY),
        "pattern": "2:4",
        "calibration": SECTION,
        "stages": ["wanda"],
        "output": str(tmp_path / "one"),
        "evaluate": {"perplexity": [{"source": "python-docs", "windows": 4}], "length": 64},
    }
    one = sparsekit.fit(given, quiet=True)
    two = sparsekit.fit(recipe(tmp_path, "two"), settings=["stages=[wanda]"], quiet=True)
    assert one.verified and two.verified and same(one.model, two.model)
    figures = sparsekit.evaluate(
        *sparsekit.load(tmp_path / "one"), perplexity=given["evaluate"]["perplexity"], length=64
    )
    assert figures["python-docs"].value == one.report["evaluation"]["pruned"]["perplexity"]["python-docs"]
    assert figures["python-docs"].count == 4 and figures["python-docs"].better == "lower"
    with pytest.raises(ValueError, match="unknown key"):
        sparsekit.fit(given | {"stage": []})
    assert issubclass(StageError, ValueError)
