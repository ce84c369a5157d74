"""The command line: exit status and messages in process, imports and start in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsekit import __version__, registry
from sparsekit.cli import main

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "recipes" / "demo.yaml")
HEAVY = {"torch", "lightning", "transformers", "datasets", "lm_eval", "torchmetrics"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`sparsekit ...` in a new process that, at its end, says on stderr what it imported."""
    code = (
        "import atexit, sys; atexit.register(lambda: print('IMPORTED', *sys.modules, file=sys.stderr))\n"
        "from sparsekit.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stderr.rpartition("IMPORTED ")[2].split())


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """sparsekit.run, replaced: nothing is pruned."""
    import sparsekit

    fake = SimpleNamespace(calls=[], answer=0)

    def fit(recipes: Any, **options: Any) -> int:
        fake.calls.append((recipes[""], options))
        if isinstance(fake.answer, BaseException):
            raise fake.answer
        return fake.answer

    fake.run_each = fit
    monkeypatch.setitem(sys.modules, "sparsekit.run", fake)
    monkeypatch.setattr(sparsekit, "run", fake, raising=False)
    return fake


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fit", "--help"]])
def test_help_imports_nothing(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert not imported(done) & (HEAVY | {"pydantic", "ruamel.yaml", "rich"})


BEGINS = f"{DEMO}: looking at its methods and its model\n"


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "wanda"], ["schema"]])
def test_listings_do_not_import_torch(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert not imported(done) & HEAVY


def test_mistakes_of_structure_do_not_import_torch() -> None:
    done = run("fit", "--recipe", DEMO, "--set", "stages.0=sparsegptt")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "sparsekit: --set stages.0=sparsegptt: unknown method `sparsegptt`, did you mean `spar"
    )
    assert "Traceback" not in done.stderr
    assert not imported(done) & HEAVY


def test_mistakes_of_options_import_only_the_methods() -> None:
    done = run("fit", "--recipe", DEMO, "--set", "stages.0.sparsegpt.dampng=1")
    assert done.returncode == 2
    assert "unknown option `dampng`, did you mean `damping`?" in done.stderr
    assert imported(done) & HEAVY == {"torch"}


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "sparsekit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"sparsekit {__version__}\n"


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: sparsekit" in capsys.readouterr().err


def test_fit_hands_over_a_checked_recipe(fake_run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "fit",
        "--recipe",
        DEMO,
        "--set",
        "pattern=4:8",
        "seed=3",
        "--set",
        "keep=true",
        "--resume",
        "--dry-run",
    ]
    assert main(arguments) == 0
    [(recipe, options)] = fake_run.calls
    assert (recipe.pattern, recipe.seed, recipe.keep) == ("4:8", 3, True)
    assert options == {"resume": True, "dry_run": True}
    assert capsys.readouterr() == (BEGINS, "")  # said before any heavy library is imported


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (ValueError("the width 7 is not divisible"), 2, "sparsekit: the width 7 is not divisible\n"),
        (FileNotFoundError("no folder x"), 2, "sparsekit: no folder x\n"),
        (OSError(28, "No space left on device"), 1, "sparsekit: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "sparsekit: stopped: finished blocks are kept, run again with --resume to go on\n"),
    ],
)
def test_exit_status(
    fake_run: SimpleNamespace, capsys: pytest.CaptureFixture[str], answer: Any, status: int, said: str
) -> None:
    fake_run.answer = answer
    assert main(["fit", "--recipe", DEMO]) == status
    assert capsys.readouterr() == (BEGINS, said)


def test_a_defect_stays_a_traceback(fake_run: SimpleNamespace) -> None:
    fake_run.answer = AttributeError("ours")
    with pytest.raises(AttributeError):
        main(["fit", "--recipe", DEMO])


def test_all_problems_in_one_message(fake_run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--recipe", DEMO, "--set", "sed=1", "patern=2"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "sparsekit: 2 problems in the recipe"
    assert main(["fit", "--recipe", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "sparsekit: nowhere.yaml: no such file\n"
    assert not fake_run.calls


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "--recipe"], ["nonsense"], ["eval", "x", "--length", "0"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_eval_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "x"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["layer 3 is not 2:4"], 1)])
def test_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failures: list[str], status: int
) -> None:
    from sparsekit.results import Verification

    monkeypatch.setattr("sparsekit.model.locate", lambda path: path)
    found = Verification(failures, per_linear={"a": {"zeros": 1, "parameters": 2}})
    monkeypatch.setattr("sparsekit.results.verify", lambda path, pattern, against: found)
    assert main(["verify", "folder", "--pattern", "2:4"]) == status
    out = capsys.readouterr().out
    assert all(failure in out for failure in failures)
    assert ("verified" in out) == (status == 0)


def test_methods_lists_everything_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 or "NAME" in line for line in short)  # a line each, whatever the terminal
    assert main(["methods", "--long"]) == 0
    out = capsys.readouterr().out
    assert len(short) < 0.7 * len(out.splitlines())
    for group in registry.GROUPS:
        for name in registry.names(group):
            assert f"  {name} " in out
            assert registry.describe(registry.find(group, name)).summary in out
    assert f"sparsekit-lightning {__version__}" in out


def test_methods_explains_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "refit"]) == 0
    out = capsys.readouterr().out
    read = registry.describe(registry.find("solvers", "refit"))
    assert read.doc in out
    assert "  damping: float, at least 0" in out and "  iterations: int, at least 1 = 100\n" in out
    assert "continues a chain" in out
    assert f"{os.sep}refit.py:{read.line}" in out
    assert main(["methods", "refti"]) == 2
    assert "did you mean `refit`?" in capsys.readouterr().err


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "stages"]


def test_doctor_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_free_bytes"] > 0
    assert found["versions"].keys() >= {"torch", "transformers", "lightning"}
    assert found["network"]["offline"] and any("HF_HUB_OFFLINE" in remark for remark in found["remarks"])
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "optional packages" in said and "xllamacpp" in said and "accelerator" in said


def test_eval_on_a_device_in_json(models, tmp_path, capsys):
    """Figures go to a file too; a device that is not there, and a metric that does not read, are one sentence."""
    file = tmp_path / "figures.json"
    told = ["eval", str(models / "tiny-llama"), "--perplexity", "python-docs", "--windows", "2", "--length", "32"]
    metric = "{embeddings: {texts: 3, length: 16}}"
    more = ["--device", "cpu", "--batch", "2", "--json", str(file), "--metric", metric]
    assert main([*told, *more, "--against", str(models / "tiny-llama")]) == 0
    found = json.loads(file.read_text())
    assert found["settings"]["batch"] == 2 and found["settings"]["metrics"] == [
        {"embeddings": {"texts": 3, "length": 16}}
    ]
    [measured] = found["models"].values()
    assert 1 < measured["perplexity"]["python-docs"] < 1000
    assert main([*told, "--device", "abacus"]) == 2
    assert "device is abacus, and this machine has" in capsys.readouterr().err


def test_quiet_and_verbose(models, tmp_path, capsys):
    """Before the command or behind it; mistakes are still said."""
    folder = str(models / "tiny-llama")
    assert main(["--quiet", "verify", folder]) == main(["verify", folder, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    file = tmp_path / "found.json"
    assert main(["verify", folder, "--json", str(file)]) == 0 and capsys.readouterr().out
    assert json.loads(file.read_text())["verified"] is True
    assert main(["--quiet", "verify", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_completion(capsys):
    """What a shell reads, where shtab is installed; else how to have it."""
    try:
        import shtab  # noqa: F401
    except ImportError:
        assert main(["completion", "bash"]) == 2 and "pip install shtab" in capsys.readouterr().err
        return
    assert main(["completion", "bash"]) == 0
    assert "--dry-run" in capsys.readouterr().out
