"""`targets`, `ignore` and a pattern for each target: which linears a recipe prunes."""

from pathlib import Path

import pytest
import torch

import sparsekit
from sparsekit.cli import main
from sparsekit.maths import parse
from sparsekit.model import discover, kind_of, load_plain, meant, split_experts

MOE = Path(__file__).parent / "models" / "tiny-moe"
LLAMA = MOE.parent / "tiny-llama"
TEXT = {"source": "python-docs", "samples": 4, "length": 32}


@pytest.fixture
def moe():
    return load_plain(MOE)


def pruned(moe, **settings):
    model, tokenizer = moe
    given = {"pattern": "50%", "stages": ["wanda"], "calibration": TEXT} | settings
    result = sparsekit.prune(model, tokenizer, **given)
    assert result.verified, result.verify()
    return result


def shares(result) -> dict[str, float]:
    model = result.model
    split_experts(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    return {name: float((module.weight == 0).float().mean()) for name, module in linears.items()}


def test_targets_are_pruned_and_nothing_else(moe):
    result = pruned(moe, targets=["experts", "self_attn.o_proj"])
    for name, share in shares(result).items():
        assert share == pytest.approx(0.5 if "experts" in name or "o_proj" in name else 0.0, abs=0.02), name
    assert result.report["skipped"]["model.layers.0.self_attn.q_proj"] == "not among the targets"
    whole = result.report["sparsity"]["whole"]
    zeros = sum(int((p == 0).sum()) for p in result.model.parameters())
    assert whole["share"] == pytest.approx(zeros / whole["parameters"])


def test_ignored_are_left_and_ranges_are_blocks(moe):
    for name, share in shares(pruned(moe, ignore=["blocks 1-2", "q_proj"])).items():
        left = ".layers.1." in name or ".layers.2." in name or "q_proj" in name
        assert (share == 0) == left, name


def test_every_target_has_its_own_pattern(moe):
    result = pruned(moe, pattern={"block 0": "75%", "attention": "30%", "experts": "2:4"})
    for name, entry in result.report["sparsity"]["per_linear"].items():
        first = ".layers.0." in name
        assert entry["pattern"] == ("75%" if first else "2:4" if "experts" in name else "30%"), name
    kept = result.masks["model.layers.2.mlp.experts.3.up_proj"]
    assert parse("2:4").satisfied(kept)


def test_kinds_are_told_apart(moe):
    model, _ = moe
    block = discover(model, torch.arange(8)[None], routers=True)[0]
    kinds = {name.removeprefix("model.layers.0."): kind_of(block, name) for name in block.linears}
    assert kinds["self_attn.q_proj"] == "attention" and kinds["mlp.experts.7.down_proj"] == "experts"
    assert set(kinds.values()) == {"attention", "experts"}
    assert meant(block, "model.layers.0.self_attn.q_proj", "layers.0")
    assert not meant(block, "model.layers.0.self_attn.q_proj", "proj")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("targets: [gate_pro]", "did you mean `gate_proj`?"),
        ("ignore: [attentoin]", "did you mean `attention`?"),
        ("targets: [router]", "no linears of the kind `router`"),
        ("ignore: [blocks 4-9]", "`blocks 4-9` means no linear"),
        ("targets: []", "nothing would be pruned"),
        ("ignore: [attention, experts]", "leave no linear to prune"),
        ('pattern: {mlp: "30"}', "must be the share to remove"),
        ("pattern: {}", "or one for each target"),
        ('pattern: {attention: "50%"}\nallocation: owl', "leave out one of the two"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(line, said, tmp_path, capsys):
    lines = [f"model: {MOE}", "stages: [wanda]", "calibration: {source: python-docs, samples: 4, length: 32}", line]
    lines += [] if line.startswith("pattern") else ['pattern: "50%"']
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    assert main(["fit", "--recipe", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_folders_that_are_no_checkpoint_are_told_what_to_do(tmp_path, capsys):
    cases = {
        "adapter": ({"adapter_config.json": '{"base_model_name_or_path": "some/base"}'}, "is an adapter of some/base"),
        "quants": ({"a.Q4.gguf": ""}, "gguf_file: a.Q4.gguf"),
        "packed": (
            {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'}
            | {"model.safetensors": (MOE / "model.safetensors").read_bytes()},
            "stores its weights quantized (gptq)",
        ),
    }
    for name, (files, said) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        (tmp_path / "r.yaml").write_text(f'model: {folder}\npattern: "50%"\nstages: [magnitude]')
        assert main(["fit", "--recipe", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    (tmp_path / "r.yaml").write_text(f'model: {tmp_path}/adaptr\npattern: "50%"\nstages: [magnitude]')
    assert main(["fit", "--recipe", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    assert "did you mean" in " ".join(capsys.readouterr().err.split())


def test_a_later_solver_can_be_for_some_linears_alone():
    """DSnoT on attention alone, as its published code has it: elsewhere stays what the solver before found."""
    chain = ["wanda", {"dsnot": {"targets": "attention"}}]
    found = {}
    for stages in (["wanda"], ["wanda", "dsnot"], chain):
        result = sparsekit.prune(*load_plain(LLAMA), pattern="50%", stages=stages, calibration=TEXT)
        assert result.verified
        found[str(stages)] = result.masks
    alone, everywhere, attention = found.values()
    for name, kept in attention.items():
        mixes = ".layers.0.self_attn." in name  # later blocks are given other inputs
        assert torch.equal(kept, (everywhere if mixes else alone)[name]) or ".layers.0." not in name, name
    first = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(attention[first], alone[first])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"wanda": {"targets": ["attention"]}}], "goes on with another's answer: use the recipe's own key `targets`"),
        (["wanda", {"refit": {"targets": []}}], "is [], must be a name, or a list of names"),
        (["wanda", {"refit": {"targets": ["q_prj"]}}], "targets of `refit`: `q_prj` means no linear of this model"),
        (["wanda", {"quantize": {"targets": "mlp"}}], "a stage that quantizes takes all linears"),
        ([{"lamp": {"solver": ["wanda", {"refit": {"targets": "mlp"}}]}}], "unknown option `targets`"),
    ],
)
def test_targets_of_a_stage_are_checked(stages, said):
    with pytest.raises(ValueError) as caught:
        sparsekit.prune(*load_plain(LLAMA), pattern="50%", stages=stages, calibration=TEXT)
    assert said in " ".join(str(caught.value).split())
