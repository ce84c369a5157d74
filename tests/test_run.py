"""Whole runs on the tiny real model, through the command line where a user would be there."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekit import cli
from sparsekit.maths import parse
from sparsekit.model import split_experts
from sparsekit.results import seal

TINY = Path(__file__).parent / "models" / "tiny-llama"
RECIPE = """\
model: {model}
pattern: "2:4"
calibration: {{source: python-docs, samples: 8, length: 64}}
stages: [sparsegpt]
evaluate: {{perplexity: [{{source: python-docs, windows: 6}}], length: 64}}
output: {output}
"""


def recipe(tmp_path: Path, output: str = "run", model: Path = TINY) -> Path:
    """A recipe file for the tiny model whose output lies in tmp_path."""
    file = tmp_path / f"{output}.yaml"
    file.write_text(RECIPE.format(model=model, output=tmp_path / output))
    return file


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def fit(file: Path, *args: str) -> Done:
    """`sparsekit fit` in this process: importing torch and lightning anew takes seconds."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = cli.main(["fit", "--recipe", str(file), *args])
    return Done(status, out.getvalue(), err.getvalue())


def process(code: str, *args: object, **env: str) -> subprocess.CompletedProcess:
    """Python code in a real process, which may be killed."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def bits(run: Path) -> str:
    """What the result's weights and masks are, bit for bit."""
    files = [run / "model" / "model.safetensors", run / "masks.safetensors"]
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, and what it printed in `printed`."""
    folder = tmp_path_factory.mktemp("finished")
    done = fit(recipe(folder))
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder / "run"


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    kept = {"model", "masks.safetensors", "metrics.csv", "recipe.yaml", "report.html", "report.json", "run.json"}
    kept.add("manifest.json")
    assert names == kept
    report = json.loads((finished / "report.json").read_text())
    assert report["verified"] is True and report["sparsity"]["total"] == pytest.approx(0.5, abs=1e-4)
    names = {"prepare", "load", "evaluate dense", "capture", "sparsegpt", "save", "verify", "evaluate pruned"}
    assert {stage["name"] for stage in report["stages"]} == names
    assert all(stage["seconds"] >= 0 and stage["peak_memory_bytes"] > 10**7 for stage in report["stages"])
    linears = report["sparsity"]["per_linear"]
    assert linears.keys() == report["error"].keys() and len(linears) % 7 == 0
    assert all(e["pattern"] == "2:4" and e["zeros"] * 2 >= e["parameters"] for e in linears.values())
    assert all(0 < error < 1 for error in report["error"].values())
    dense, pruned = (report["evaluation"][which]["perplexity"]["python-docs"] for which in ("dense", "pruned"))
    assert 1 < dense < pruned < 10 * dense
    card = (finished / "model" / "README.md").read_text()
    assert str(finished) not in card and str(TINY) not in card  # no path of this machine
    told = ModelCard.load(finished / "model" / "README.md").data
    assert {"sparsekit", "pruned", "2:4"} <= set(told.tags) and told.metrics == ["perplexity"]
    assert told.library_name == "transformers" and told.base_model is None  # the source is a folder
    assert "from_pretrained" in card and f"{pruned:.2f}" in card and "2:4" in card
    assert (finished / "metrics.csv").read_text().count("\n") == len(linears) // 7 + 1
    printed = (finished.parent / "printed").read_text()
    assert f"{pruned:.2f}" in printed and "proved from disk" in printed and "from_pretrained" in printed


def test_the_result_loads_with_plain_transformers(finished):
    code = f"""
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{finished / "model"}")
    tokenizer = AutoTokenizer.from_pretrained("{finished / "model"}")
    ids = tokenizer("The return statement", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert "sparsekit" not in sys.modules
    """
    done = process(code)
    assert done.returncode == 0, done.stderr


def test_only_the_linears_of_the_blocks_changed(finished):
    before = load_file(TINY / "model.safetensors")
    after = load_file(finished / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        pruned = name.endswith("proj.weight")
        assert pruned != torch.equal(tensor, before[name]), name
        assert not pruned or not (torch.signbit(tensor) & (tensor == 0)).any()


def test_the_resolved_recipe_gives_the_same_bits(finished, tmp_path):
    done = fit(finished / "recipe.yaml", "--set", f"output={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "again") == bits(finished)


def test_a_finished_run_is_left_alone(finished):
    before = bits(finished)
    again = fit(finished.parent / "run.yaml")
    assert again.returncode == 2 and "holds a finished run" in again.stderr
    resumed = fit(finished.parent / "run.yaml", "--resume")
    assert resumed.returncode == 0 and "is finished" in resumed.stdout
    changed = fit(finished.parent / "run.yaml", "--resume", "--set", "stages.0.sparsegpt.damping=0.1")
    assert changed.returncode == 2 and "recipe.stages was" in changed.stderr
    assert bits(finished) == before


# where a process is killed: the name of a function, and the call of it before or after which SIGKILL comes
KILLS = {
    "before the first block": "kill(blocks.Block, 'until', before=1)",
    "while a block is solved": "kill(walk.OneShot, '_solve', before=10)",
    "before a block is renamed into place": "kill(os, 'replace', before=4)",
    "after a block is renamed into place": "kill(os, 'replace', after=4)",
    "before the model is moved into place": "kill(pathlib.Path, 'rename', before=1)",
    "after the model is moved into place": "kill(pathlib.Path, 'rename', after=1)",
    "while the pruned model is measured": "kill(fitting, 'evaluate', before=2)",
    "before the report is renamed into place": "kill(fitting, 'write_json', before=1)",
    "while the blocks are removed": "kill(fitting, 'clear_working_files', before=1)",
}
KILLER = """
import os, pathlib, signal, sys
from sparsekit import cli
from sparsekit.model import blocks
from sparsekit.run import fitting
from sparsekit.walk import walk

def kill(owner, name, before=0, after=0):
    real, calls = getattr(owner, name), [0]
    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, deadly)

{how}
sys.exit(cli.main(["fit", "--recipe", sys.argv[1], "--resume"]))
"""


OFTEN = ("before a block is renamed into place", "before the model is moved into place", "while the blocks are removed")


@pytest.mark.parametrize(
    "when", [when if when in OFTEN else pytest.param(when, marks=pytest.mark.long) for when in KILLS]
)
def test_killed_and_resumed_gives_the_same_bits(when, finished, tmp_path):
    file = recipe(tmp_path)
    script = KILLER.replace("{how}", KILLS[when])
    killed = process(script, file)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if "removed" not in when:
        assert not (tmp_path / "run" / "report.json").exists()
    resumed = fit(file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert bits(tmp_path / "run") == bits(finished)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    expected = json.loads((finished / "report.json").read_text())
    assert report["error"] == expected["error"] and report["evaluation"] == expected["evaluation"]
    assert (tmp_path / "run" / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {path.name for path in finished.iterdir()}


def test_ctrl_c_says_how_to_go_on(finished, tmp_path):
    file = recipe(tmp_path)
    script = KILLER.replace("{how}", "kill(walk.OneShot, '_solve', before=10)").replace("SIGKILL", "SIGINT")
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    stopped = process(heard + textwrap.dedent(script), file)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert fit(file, "--resume").returncode == 0
    assert bits(tmp_path / "run") == bits(finished)


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Gemma", "Mixtral"])
def test_other_families_from_disk_to_disk(family, tmp_path):
    """Transposed weights, learned positions, a scaled embedding, fused experts that are stored one by one."""
    from families import SETTINGS, build

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    settings = SETTINGS[family] | {"vocab_size": len(tokenizer)}
    dense = build(family, settings=settings)
    dense.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = fit(recipe(tmp_path, model=tmp_path / "model"), "--set", "evaluate.length=32", "calibration.length=32")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "left as it is" not in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    split_experts(pruned)
    split_experts(dense)
    modules, before = dict(pruned.named_modules()), dict(dense.named_modules())
    assert report["sparsity"]["per_linear"]
    for name in report["sparsity"]["per_linear"]:
        weight = modules[name].weight.t() if family == "GPT2" else modules[name].weight
        assert parse("2:4").satisfied(weight.detach())
        assert not torch.equal(modules[name].weight, before[name].weight)


def test_eval_and_verify_take_a_run(finished, capsys):
    """The folder of a run serves as well as the model's, and its source is measured beside it."""
    assert cli.main(["verify", str(finished), "--pattern", "2:4", "--against", str(TINY)]) == 0
    assert cli.main(["verify", str(finished), "--pattern", "1:4"]) == 1
    command = ["eval", str(finished), "--perplexity", "python-docs", "--length", "64", "--windows", "6"]
    capsys.readouterr()
    assert cli.main(command) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    report = json.loads((finished / "report.json").read_text())
    for which in ("dense", "pruned"):
        assert f"{report['evaluation'][which]['perplexity']['python-docs']:.4g}" in printed
    assert "6 x 64 tokens" in printed


def test_a_finished_run_is_finished_on_any_machine(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = recipe(tmp_path)
    torch.set_num_threads(2)
    again = fit(file, "--resume")
    torch.set_num_threads(1)
    assert again.returncode == 0, again.stderr
    assert "4:8" in fit(file, "--resume", "--set", "pattern=4:8").stderr  # another recipe is another run


def test_an_unfinished_run_is_continued_or_refused_with_the_difference(finished, tmp_path):
    file = recipe(tmp_path)
    script = KILLER.replace("{how}", "kill(walk.OneShot, '_solve', before=6)")  # a block has four inputs of linears
    assert process(script, file).returncode == -signal.SIGKILL
    again = fit(file)
    assert again.returncode == 2 and "unfinished run with 1 committed blocks" in again.stderr
    cases = {
        "pattern=4:8": "recipe.pattern was",
        "calibration.seed=1": "the calibration text gives other tokens",
        "error_correction=block": "recipe.error_correction was",
    }
    for setting, said in cases.items():
        changed = fit(file, "--resume", "--set", setting)
        assert changed.returncode == 2 and said in changed.stderr, changed.stderr
    torch.set_num_threads(2)
    changed = fit(file, "--resume")
    torch.set_num_threads(1)
    assert changed.returncode == 2 and "threads was 1, is 2" in changed.stderr, changed.stderr
    other = tmp_path / "other"
    other.mkdir()
    for path in TINY.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = fit(file, "--resume", "--set", f"model={other}")
    assert changed.returncode == 2 and "the source model's weights are others" in changed.stderr
    resumed = fit(file, "--resume", "--set", "memory.activations=10kB", "--set", "evaluate.batch=2")
    assert resumed.returncode == 0, resumed.stderr  # what does not change the weights may change
    assert bits(tmp_path / "run") == bits(finished)


@pytest.mark.parametrize("limit", [60_000, 700_000])
def test_a_full_disk_keeps_the_committed_blocks(limit, finished, tmp_path):
    """A limit on the size of files stands for the full disk: whatever does not fit, it is known before blocks are."""
    file = recipe(tmp_path)
    code = f"""
    import resource, sys
    from sparsekit import cli
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    sys.exit(cli.main(["fit", "--recipe", {str(file)!r}]))
    """
    full = process(code)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr and "blocks are committed in" in full.stderr, full.stderr
    assert "--resume" in full.stderr
    assert not (tmp_path / "run" / "model").exists()
    resumed = fit(file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert bits(tmp_path / "run") == bits(finished)


def test_a_folder_that_cannot_be_written(tmp_path):
    file = recipe(tmp_path)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        done = fit(file, "--set", f"output={output}")
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        assert str(output) in done.stderr.replace("\n", "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    done = fit(file, "--set", f"output={tmp_path / 'mine'}")
    assert done.returncode == 2 and "is not empty and holds no run" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def broken_model(tmp_path: Path, damage: str) -> Path:
    """A copy of the tiny model with one thing wrong."""
    folder = tmp_path / damage
    folder.mkdir()
    for path in TINY.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    else:
        tensors = load_file(weights)
        if damage == "nan":
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        if damage == "missing tensor":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncated", "model.safetensors is damaged or truncated"),
        ("no config", "has no config.json"),
        ("no weights", "holds no safetensors"),
        ("nan", "the weight of model.layers.1.mlp.up_proj contains NaN or Inf"),
        ("missing tensor", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_broken_model_is_named(damage, said, tmp_path):
    done = fit(recipe(tmp_path, model=broken_model(tmp_path, damage)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in done.stderr.replace("\n", ""), done.stderr
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model=no-such/model", "no model 'no-such/model'"),
        ("pattern=2:5", "model.layers.0.self_attn.q_proj"),
        ("calibration.length=100000", "positions"),
        ("calibration.source=nowhere.txt", "nowhere.txt"),
        ("evaluate.perplexity=[nowhere.txt]", "nowhere.txt"),
        ("evaluate.length=100000", "positions"),
        ("stages=[sparsegpt, wanda]", "cannot start from the answer of `sparsegpt`"),
        ("stages=[refit]", "improves the answer of an earlier stage"),
        ("stages.0.sparsegpt.dampning=1", "damping"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(setting, said, tmp_path):
    done = fit(recipe(tmp_path), "--set", setting)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and said in done.stderr.replace("\n", ""), done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_reads_no_weights_and_writes_nothing(tmp_path):
    model = broken_model(tmp_path, "nan")
    done = fit(recipe(tmp_path, model=model), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj" in done.stdout and "TFLOP" in done.stdout and "damping: 0.01" in done.stdout
    assert not (tmp_path / "run").exists()


def test_quality_is_in_the_right_order(finished, tmp_path):
    measured = {}
    for name in ("magnitude", "wanda", "wanda, refit"):
        output = tmp_path / name.replace(", ", "-")
        done = fit(recipe(tmp_path), "--set", f"stages=[{name}]", f"output={output}")
        assert done.returncode == 0, done.stderr
        measured[name] = json.loads((output / "report.json").read_text())["evaluation"]
    loss = {name: values["pruned"]["perplexity"]["python-docs"] for name, values in measured.items()}
    dense = measured["wanda"]["dense"]["perplexity"]["python-docs"]
    sparsegpt = json.loads((finished / "report.json").read_text())["evaluation"]["pruned"]["perplexity"]["python-docs"]
    assert dense < loss["wanda, refit"] < loss["wanda"] < loss["magnitude"]
    assert dense < sparsegpt < loss["magnitude"]


def test_a_finished_run_that_failed_stays_failed(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"verified": ["layer 3 is not 2:4"]}))
    seal(copy)  # as the run would have
    again = fit(finished.parent / "run.yaml", "--resume", "--set", f"output={copy}")
    assert again.returncode == 1 and "not as asked" in again.stdout
