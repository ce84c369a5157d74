"""The contracts: everything installed keeps them, the examples of the documentation too, and who lies is stopped."""

import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.torch import load_file
from test_run import fit, recipe

import sparsekit
from sparsekit import cli, registry
from sparsekit.maths import NM, Unstructured, parse
from sparsekit.testing import (
    check_allocator,
    check_criterion,
    check_exporter,
    check_metric,
    check_stage,
    fuzz_criterion,
    fuzz_solver,
    fuzz_stage,
)

EXAMPLES = Path(__file__).parent / "examples"
SHORT = {"steps": 2, "length": 16, "batch": 2, "source": "python-docs", "checks": 1}
STAGES: dict[str, dict[str, Any]] = {  # options that make a stage short
    "lamp": {"epochs": 1},
    "sparsellm": {"epochs": 1},
    "lora": SHORT,
    "finetune": SHORT,
    "policy_gradient": {"remove": "30%", "steps": 3, "length": 16, "batch": 1, "masks": 2, "group": 4},
}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.parametrize("name", registry.names("allocators"))
def test_every_rule(name: str) -> None:
    check_allocator(registry.load("allocators", name))


@pytest.mark.parametrize("name", [name for name in registry.names("criteria") if name != "bonsai"])
def test_every_criterion(name: str) -> None:
    check_criterion(registry.load("criteria", name))


@pytest.mark.parametrize("name", [name for name in registry.names("stages") if name in STAGES])
def test_every_stage(name: str) -> None:
    check_stage(registry.load("stages", name), tokenizer=Letters(), **STAGES[name])


@pytest.mark.parametrize("name", registry.names("solvers"))
def test_every_solver_stands_hostile_layers(name: str) -> None:
    fuzz_solver(registry.load("solvers", name), [NM(2, 4), Unstructured(0.5)])


@pytest.mark.long
@pytest.mark.parametrize("name", registry.names("solvers"))
def test_every_solver_stands_hostile_layers_and_patterns(name: str) -> None:
    fuzz_solver(registry.load("solvers", name), seed=1)


@pytest.mark.parametrize("name", [name for name in registry.names("criteria") if name != "bonsai"])
def test_every_criterion_stands_hostile_models(name: str) -> None:
    fuzz_criterion(registry.load("criteria", name))


@pytest.mark.parametrize("name", [name for name in registry.names("stages") if name in STAGES])
def test_every_stage_stands_hostile_models(name: str) -> None:
    fuzz_stage(registry.load("stages", name), tokenizer=Letters(), **STAGES[name])


def test_the_fuzz_finds_what_is_wrong() -> None:
    def halves(weight: Any, stats: Any, pattern: Any) -> Any:
        """Divide by the Gram's diagonal, which may be zero."""
        return (weight / stats.gram.diagonal()).masked_fill(~pattern.keep(weight.abs()), 0)

    with pytest.raises(AssertionError, match="contains NaN or Inf"):
        fuzz_solver(halves)


def test_no_built_in_stage_is_forgotten() -> None:
    ours = [e.name for e in registry.entries("stages") if e.module_name.startswith("sparsekit.")]
    assert set(ours) == set(STAGES)


class Letters:
    """A tokenizer that knows letters alone, for a model of 96 tokens."""

    eos_token_id = 1
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 94 + 2 for letter in text]}


def test_the_examples_keep_the_contracts_and_are_short() -> None:
    import deeper
    import learned_mask
    import norm_of_columns

    check_stage(learned_mask.learned_mask, steps=2)
    check_criterion(norm_of_columns.norm_of_columns)
    check_allocator(deeper.deeper)
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file.name


def test_the_documentation_has_the_examples_as_they_are_tested() -> None:
    text = (EXAMPLES.parents[1] / "docs" / "plugins.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        assert file.read_text().rstrip() in text, file.name


def test_every_other_piece_of_python_in_the_documentation_runs() -> None:
    text = (EXAMPLES.parents[1] / "docs" / "plugins.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "varying" not in code or "def varying" in code:  # that one imports what another piece defines
            exec(compile(code, "docs/plugins.md", "exec"), {"__name__": "example"})


# A package that is installed for a test


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a package `stranger` whose module holds this text, under these entry points."""

    def put(text: str, **groups: str) -> None:
        site = tmp_path / "site"
        info = site / "stranger-3.0.dist-info"
        info.mkdir(parents=True)
        points = "".join(f"[sparsekit.{group}]\n{point}\n" for group, point in groups.items())
        (info / "entry_points.txt").write_text(points)
        (site / "stranger_mod.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(site)
        sys.modules.pop("stranger_mod", None)

    return put


def test_a_learned_mask_is_proved_and_recovered(install: Any, tmp_path: Path) -> None:
    """The 37 lines that once ended `verified: true` with 28 of 28 linears dense."""
    install("", stages="learned-mask = learned_mask:learned_mask")
    file = recipe(tmp_path)
    lora = "{lora: {steps: 4, length: 32, batch: 2, checks: 1}}"
    done = fit(file, "--set", f"stages=[{{learned-mask: {{steps: 4}}}}, {lora}]")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["verified"] is True and report["sparsity"]["total"] == pytest.approx(0.5, abs=1e-3)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert len(report["sparsity"]["per_linear"]) == 28
    assert all(parse("2:4").satisfied(weights[f"{name}.weight"]) for name in report["sparsity"]["per_linear"])
    assert cli.main(["verify", str(tmp_path / "run"), "--pattern", "2:4"]) == 0
    done = fit(recipe(tmp_path, "none"), "--set", "stages=[learned_mask]", "pattern=null")
    assert done.returncode == 2 and "missing key `pattern`, which `learned-mask` prunes to" in done.stderr


def test_a_new_criterion_and_a_new_rule_run(install: Any, tmp_path: Path) -> None:
    install("", criteria="norm-of-columns = norm_of_columns:norm_of_columns", allocators="deeper = deeper:deeper")
    stages = '[{norm-of-columns: {remove: "25%", power: 1}}, wanda]'
    done = fit(recipe(tmp_path), "--set", f"stages={stages}", "allocation=deeper", "pattern=50%", "evaluate={}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["structure"]["total"] >= 0.25 and report["verified"] is True
    learned = '[{policy_gradient: {remove: "25%", initial: norm_of_columns, steps: 2, length: 64, masks: 2}}]'
    done = fit(recipe(tmp_path, "pg"), "--set", f"stages={learned}", "pattern=null", "evaluate={}")
    assert done.returncode == 0, done.stderr


HEAD = """
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from sparsekit.contracts import Effect, Fit, declares
from sparsekit.walk import Walk
from sparsekit.maths import Quantization

class Once(LightningModule):
    def __init__(self, act):
        super().__init__()
        self.act, self.one = act, torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD([self.one], lr=0.0)

    def training_step(self, batch, index):
        return self.one.sum()

    @torch.no_grad()
    def on_train_end(self):
        self.act()

def once(act):
    return Fit(Once(act), DataLoader([0]))

def masks(context, keep=lambda name, mask: mask):
    for block in context.blocks:
        for name, linear in block.linears.items():
            block.masks[name] = keep(name, context.patterns[name].keep(linear.weight.abs()))
"""
LIARS = {
    "says nothing": ("", "pass", "does not declare what it does to the model"),
    "gives no masks": ("Effect(prunes=True)", "pass", "there is no mask for model.layers.0"),
    "another shape": (
        "Effect(prunes=True)",
        "masks(context, lambda name, mask: mask[:, :4])",
        "is torch.bool",
    ),
    "another dtype": ("Effect(prunes=True)", "masks(context, lambda name, mask: mask.float())", "is torch.float32"),
    "not 2:4": ("Effect(prunes=True)", "masks(context, lambda name, mask: mask | True)", "0 zeros, which is not 2:4"),
    "weights outside the mask": (
        "Effect(prunes=True, moves=True)",
        "masks(context)",
        "weights where its mask says zero",
    ),
    "moves a norm unsaid": (
        "Effect(prunes=True)",
        "masks(context); context.blocks[0].module.input_layernorm.weight.add_(1)",
        "input_layernorm.weight changed, and it does not say so",
    ),
    "moves kept weights unsaid": (
        "Effect(prunes=True)",
        "masks(context); next(iter(context.blocks[0].linears.values())).weight.mul_(2)",
        "changed, and it does not say so",
    ),
    "says that it moves and may not": (
        "Effect(prunes=True)",
        "masks(context); context.blocks[0].trained.add('input_layernorm.weight')",
        "does not declare that it moves weights",
    ),
    "moves the embedding": (
        "Effect(prunes=True)",
        "masks(context); context.model.model.embed_tokens.weight.add_(1)",
        "which is outside the blocks",
    ),
    "is on no grid": (
        "Effect(prunes=True, grid=Quantization(4, 32))",
        "masks(context)",
        "nothing of model.layers.0 was kept",
    ),
    "leaves NaN": (
        "Effect(moves=True)",
        "n = context.blocks[0].module.input_layernorm; n.weight.fill_(torch.nan); "
        "context.blocks[0].trained.add('input_layernorm.weight')",
        "contains NaN or Inf",
    ),
    "prunes unsaid": ("Effect(moves=True)", "masks(context)", "does not declare that it prunes"),
    "cuts nothing": ("Effect(cuts=True)", "pass", "decided nothing"),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_stage_that_lies_is_stopped_before_anything_is_on_disk(lie: str, install: Any, tmp_path: Path) -> None:
    effect, act, said = LIARS[lie]
    declared = f"@declares({effect})\n" if effect else ""
    body = f'def liar(context):\n    """Lie."""\n    return once(lambda: [{act.replace("; ", ", ")}])\n'
    if "n = " in act or "pass" in act:
        inner = "\n        ".join(act.split("; "))
        body = f'def liar(context):\n    """Lie."""\n    def act():\n        {inner}\n    return once(act)\n'
    install(HEAD + declared + body, stages="liar = stranger_mod:liar")
    stages = "[wanda, liar]" if lie == "prunes unsaid" else "[liar]"
    pattern = [] if "prunes=True" in effect or not effect or "wanda" in stages else ["pattern=null"]
    done = fit(recipe(tmp_path), "--set", f"stages={stages}", "evaluate={}", *pattern)
    assert done.returncode == 2, done.stdout + done.stderr
    message = " ".join(done.stderr.split())
    assert said in message and "`liar` of stranger 3.0" in message and "Traceback" not in message, message
    blocks = tmp_path / "run" / "blocks"
    assert not list((blocks / "1" if stages.startswith("[wanda") else blocks).glob("*.safetensors"))
    assert not (tmp_path / "run" / "model").exists()


def test_pruned_weights_do_not_come_back(install: Any, tmp_path: Path) -> None:
    """A stage after wanda that fills zeros and says that it moved the weight."""
    act = (
        "for block in context.blocks:\n            for name, linear in block.linears.items():\n"
        "                linear.weight.add_(0.01)\n"
        "                block.trained.add(name.removeprefix(f'{block.name}.') + '.weight')"
    )
    body = f'def liar(context):\n    """Lie."""\n    def act():\n        {act}\n    return once(act)\n'
    install(HEAD + "@declares(Effect(moves=True))\n" + body, stages="liar = stranger_mod:liar")
    done = fit(recipe(tmp_path), "--set", "stages=[wanda, liar]", "evaluate={}")
    assert done.returncode == 2
    assert "has weights again where an earlier stage pruned them" in " ".join(done.stderr.split())
    assert not list((tmp_path / "run" / "blocks" / "1").glob("*.safetensors"))


def test_code_that_cannot_be_imported_stops_only_recipes_that_use_it(install: Any, tmp_path: Path) -> None:
    install("raise RuntimeError('boom')", stages="bad = stranger_mod:bad", solvers="worse = stranger_mod:worse")
    done = fit(recipe(tmp_path), "--set", "stages=[worse]")
    assert done.returncode == 2 and "boom" in done.stderr and "stranger 3.0" in done.stderr
    done = fit(recipe(tmp_path), "--set", "stages=[wanda]", "evaluate={}")
    assert done.returncode == 0, done.stderr


BOTH = {"metrics": "bits = next_token:bits_per_token", "exporters": "masks-npz = masks_npz:masks_npz"}


def test_a_new_metric_and_a_new_exporter(install: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install("", **BOTH)
    check_metric(registry.load("metrics", "bits"), windows=3)
    check_exporter(registry.load("exporters", "masks-npz"))
    measure = "evaluate={perplexity: [{source: python-docs, windows: 6}], metrics: [{bits: {windows: 6}}], length: 64}"
    for name, stage in (("one", "sparsegpt"), ("two", "magnitude")):
        done = fit(recipe(tmp_path, name), "--set", f"stages=[{stage}]", "export=[masks_npz]", measure)
        assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    for which in ("dense", "pruned"):
        found = report["evaluation"][which]
        bits, text = found["figures"]["bits python-docs"], found["perplexity"]["python-docs"]
        assert bits["value"] == pytest.approx(math.log2(text), rel=1e-5)  # perplexity is the oracle
        assert bits["count"] == 6 and bits["better"] == "lower"
    assert report["exports"]["masks-npz"]["bytes"] > 0
    stored, masks = numpy.load(tmp_path / "one" / "model-masks-npz" / "masks.npz"), sparsekit.masks(tmp_path / "one")
    assert {*stored.files} == {*masks} and all(numpy.array_equal(stored[n], masks[n].numpy()) for n in masks)
    assert "bits python-docs" in (tmp_path / "one" / "report.html").read_text()
    assert "bits python-docs" in done.stdout
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "two"), str(tmp_path / "one"), "--by", "bits python-docs"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("one", "two"))]
    assert [line[:3] for line in lines][:2] == ["one", "two"]  # less is better
    done = fit(recipe(tmp_path, "three"), "--set", "evaluate={metrics: [{bits: {windows: 0}}]}")
    assert done.returncode == 2 and "metric `bits`: option `windows` is 0, must be at least 1" in done.stderr
    done = fit(recipe(tmp_path, "three"), "--set", "evaluate={metrics: [{bits: {source: nowhere.txt}}]}")
    assert done.returncode == 2 and "nowhere.txt" in done.stderr and not (tmp_path / "three").exists()
    done = fit(recipe(tmp_path, "three"), "--set", "export=[maks_npz]")
    assert done.returncode == 2 and "did you mean `masks-npz`" in done.stderr


@pytest.mark.parametrize("name", registry.names("exporters"))
def test_every_exporter(name: str) -> None:
    packages = {"gguf": "gguf", "onnx": "onnxscript", "openvino": "openvino"}
    if name in packages:
        pytest.importorskip(packages[name], reason=f"{packages[name]} is not installed: make test-clients")
    check_exporter(registry.load("exporters", name))
