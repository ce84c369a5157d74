"""Lightning's callbacks and loggers by class_path, precision and clipping: what reaches a Trainer, and when."""

import json
import sys
from pathlib import Path

import pytest

from sparsekit import cli

TINY = Path(__file__).parent / "models" / "tiny-llama"
RECIPE = """\
model: {model}
pattern: "50%"
calibration: {{source: python-docs, samples: 4, length: 32}}
stages: [magnitude, {{finetune: {{steps: 2, length: 32, batch: 2, source: {{source: python-docs}}}}}}]
evaluate: {{dense: false, samples: false}}
trainer: {trainer}
output: {output}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a callback, a logger and a class that is neither; it says what it saw."""
    info = tmp_path / "site" / "watchers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: watchers\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("watchers\n")
    (tmp_path / "site" / "watchers.py").write_text(
        "from lightning.pytorch import Callback\n"
        "from lightning.pytorch.loggers import CSVLogger\n"
        "SEEN = []\n"
        "class Watch(Callback):\n"
        "    def __init__(self, mark): self.mark = mark\n"
        "    def on_fit_end(self, trainer, module):\n"
        "        SEEN.append((self.mark, trainer.precision, trainer.gradient_clip_val, trainer.global_step))\n"
        "class Curves(CSVLogger): pass\n"
        "class Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("watchers", None)


def fit(tmp_path, trainer, *more):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(model=TINY, trainer=trainer, output=tmp_path / "out"))
    return cli.main(["fit", "--recipe", str(file), *more])


def test_a_callback_and_a_logger_of_a_package(tmp_path, package):
    where = tmp_path / "curves"
    given = (
        "{precision: bf16-mixed, gradient_clip_val: 0.5, "
        "callbacks: [{class_path: watchers.Watch, init_args: {mark: 7}}],"
        f" logger: [{{class_path: watchers.Curves, init_args: {{save_dir: {where}, name: x}}}}]}}"
    )
    assert fit(tmp_path, given, "--dry-run") == 0
    assert "watchers" not in sys.modules  # a dry run imports no code that a recipe names
    assert fit(tmp_path, given) == 0
    walked, trained = sys.modules["watchers"].SEEN
    assert walked == (7, "32-true", None, 4)  # a walk over four blocks is no training of the model
    assert trained == (7, "bf16-mixed", 0.5, 2)
    assert list(where.rglob("metrics.csv"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"] is True and report["sparsity"]["total"] >= 0.49


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{callbacks: [{class_path: nothing_here.Watch}]}", "nothing_here.Watch: this is not of an installed package"),
        ("{callbacks: [{class_path: watchers.Gone}]}", "watchers.Gone: it cannot be imported"),
        ("{callbacks: [{class_path: watchers.Other}]}", "watchers.Other: it is no Callback of Lightning"),
        ("{logger: [{class_path: watchers.Watch}]}", "watchers.Watch: it is no Logger of Lightning"),
        ("{callbacks: [{class_path: watchers.Watch}]}", "watchers.Watch: missing a required argument: 'mark'"),
        ("{precision: 16-mixed, accelerator: cpu}", "which a CPU does not have: give bf16-mixed or 32-true"),
    ],
)
def test_mistakes_before_anything_runs(tmp_path, package, capsys, given, said):
    assert fit(tmp_path, given) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
