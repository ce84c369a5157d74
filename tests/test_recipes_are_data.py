"""A recipe is data: no text of it runs code, fills the memory or keeps the machine busy for ever."""

import json
import sys
from pathlib import Path

import pytest

from sparsekit import registry
from sparsekit.cli import main
from sparsekit.measure import check_evaluation
from sparsekit.measure.tasks import tasks
from sparsekit.measure.templates import check_template, sandbox
from sparsekit.recipe import RecipeError, load_recipe
from sparsekit.train.watch import _due

TINY = Path(__file__).parent / "models" / "tiny-llama"
SHELL = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
GOOD = "model: m\npattern: 2:4\ncalibration: {source: python-docs}\nstages: [wanda]\n"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i} is", "a": ["even", "odd"], "l": i % 2}) + "\n" for i in range(4)))
    return file


def entry(records: Path, **changes: object) -> dict:
    return {"name": "t", "path": str(records), "prompt": "{{q}}", "choices": "{{a}}", "label": "{{l}}"} | changes


@pytest.mark.parametrize("key", ["prompt", "choices", "label"])
def test_a_template_reaches_nothing_but_its_record(key, records, tmp_path):
    import sparsekit

    mark = tmp_path / "ran"
    model, tokenizer = sparsekit.load(TINY)
    asked = entry(records, **{key: SHELL % mark + " {{l}}"})
    with pytest.raises(ValueError, match="the task `t` cannot be loaded"):
        tasks(model, tokenizer, [asked])
    assert not mark.exists()
    assert "acc" in tasks(model, tokenizer, [entry(records)])["t"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in q %}{% for b in q %}x{% endfor %}{% endfor %}",
        "{% for a in q recursive %}{{ loop(q) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ unclosed",
        "x" * 20_000,
        7,
    ],
)
def test_templates_that_could_take_for_ever_are_refused_before_anything_runs(template, records):
    with pytest.raises(ValueError, match="task `t`: `prompt`"):
        check_evaluation({"tasks": [entry(records, prompt=template)]})


@pytest.mark.parametrize(
    "template", ["{{ 'a' * 10**9 }}", "{{ 9**9**9 }}", "{{ range(10) }}", "{{ ''.__class__.mro() }}"]
)
def test_templates_that_would_fill_the_memory_fail_when_they_are_rendered(template):
    with pytest.raises(Exception, match=r"too|undefined|unsafe"):
        sandbox().from_string(template).render()


def test_templates_still_say_what_records_hold():
    text = "{% for c in a %}{{ loop.index }}. {{ c|upper }} {% endfor %}{{ q.strip() * 2 }}"
    check_template(text)
    assert sandbox().from_string(text).render(a=["x", "y"], q=" z ") == "1. X 2. Y zz"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: t\ndoc_to_text: !function utils.f\n", "the tag !function, which would run code"),
        ("task: t\nx: !!python/object/apply:os.system [ls]\n", "which would run code"),
        ("task: t\nmetric_list: [{metric: bleu, hf_evaluate: true}]\n", "`hf_evaluate`, which would run code"),
        ("include: other.yaml\n", "there is no task file"),
        ("task: [t\n", "is not valid YAML"),
    ],
)
def test_task_files_that_would_run_code(text, said, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"the task file|there is no task file") as told:
        check_evaluation({"tasks": [str(tmp_path / "t.yaml")]})
    assert said in str(told.value)


def test_what_a_task_file_includes_is_looked_at(tmp_path):
    (tmp_path / "t.yaml").write_text("include: base.yaml\ntask: t\n")
    (tmp_path / "base.yaml").write_text("include: t.yaml\ndoc_to_text: !function utils.f\n")
    with pytest.raises(ValueError, match=r"base.yaml. has the tag !function"):
        check_evaluation({"tasks": [str(tmp_path / "t.yaml")]})


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 15)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB + GOOD, "more than 20,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply"),
        ("a: &a [*a]\n" + GOOD, "nested too deeply"),
        (GOOD + "seed: !!int x\n", "is not a value of YAML's kind int"),
        (GOOD + f"seed: {'9' * 5000}\n", "seed"),
        (GOOD + "seed: 2026-13-45\n", "seed"),
        (GOOD + "# " + "x" * 1_000_001, "more than 1,000,000 bytes"),
        (GOOD + "trainer: {num_nodes: 0}\n", "num_nodes"),
    ],
)
def test_files_that_would_keep_a_reader_busy(text, said, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as told:
        load_recipe(file)
    assert any(said in problem for problem in told.value.problems), told.value.problems


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("trainer.num_nodes=2", "was not started by torchrun"),
        ("calibration.samples=1000000000", "give fewer samples, or a shorter length"),
        ("stages=[{lora: {rank: 1000000}}]", "rank is 1000000, and no linear has more than"),
    ],
)
def test_numbers_that_no_machine_can_hold(more, said, tmp_path, capsys, monkeypatch):
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "x.yaml"
    good = GOOD.replace("model: m", f"model: {TINY}").replace("python-docs}", "python-docs, length: 64, samples: 4}")
    file.write_text(good + f"output: {tmp_path / 'out'}\nevaluate: {{dense: false}}\n")
    settings = ["pattern=null"] if "lora" in more else []
    options = [] if "lora" in more else ["--dry-run"]
    assert main(["fit", "--recipe", str(file), *options, "--set", more, *settings]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("steps", "checks"), [(1, 1), (10, 3), (7, 7), (5, 8), (100, 9)])
def test_checks_are_spread_evenly(steps, checks):
    wanted = {round(steps * part / checks) for part in range(1, checks + 1)} - {0}
    assert {step for step in range(1, steps + 1) if _due(step, steps, checks)} == wanted
    assert _due(5, 10, 10**19)


# Packages of others


def package(site: Path, name: str, module: str, offers: str) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(offers)
    (site / f"{name}_mod.py").write_text(module)


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "raise SystemExit", "raise GeneratorExit('x')", "1/0"])
def test_a_plugin_that_leaves_on_import_is_named(leave, tmp_path, monkeypatch, capsys):
    package(tmp_path / "site", "leaver", leave, "[sparsekit.solvers]\nleaving = leaver_mod:leaving\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace("wanda", "leaving").replace("model: m", f"model: {TINY}"))
    assert main(["fit", "--recipe", str(file), "--dry-run"]) == 2
    assert "`leaving` of leaver 1.0 cannot be imported" in " ".join(capsys.readouterr().err.split())
    assert main(["methods"]) == 0
    sys.modules.pop("leaver_mod", None)


@pytest.mark.parametrize("broken", ["no section\n", "[sparsekit.solvers\nx = y:z\n", "[a]\nb = c\nb = d\n", "\0\xff"])
def test_broken_metadata_of_one_package_stops_nothing(broken, tmp_path, monkeypatch):
    package(tmp_path / "site", "broken", "", broken)
    package(tmp_path / "site", "sound", "", "[sparsekit.solvers]\nsounding = sound_mod:sounding\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.warns(UserWarning, match="cannot be read and are skipped"):
        found = registry.names("solvers")
    assert {"wanda", "sounding"} <= set(found)
