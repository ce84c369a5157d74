"""Recipes: every shipped one, every kind of mistake with its place, and what comes back out."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekit import registry
from sparsekit.data import CALIBRATION, resolve
from sparsekit.maths import parse
from sparsekit.measure import check_evaluation
from sparsekit.recipe import (
    Recipe,
    RecipeError,
    Stage,
    check_options,
    json_schema,
    kind,
    load_recipe,
    resolved,
    to_yaml,
)
from sparsekit.recipe.schema import names_of

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
GOOD = "model: m\npattern: 2:4\ncalibration: {source: python-docs}\nstages:\n  - wanda\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe x.yaml in the current directory."""
    monkeypatch.chdir(tmp_path)

    def put(text: str) -> Path:
        Path("x.yaml").write_text(text)
        return Path("x.yaml")

    return put


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with an allocator, a stage, and methods that can and cannot continue a chain."""
    info = tmp_path / "site" / "extra-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(
        "[sparsekit.allocators]\nstairs = extra_mod:stairs\n[sparsekit.stages]\nlo-ra = extra_mod:lora\n"
        "[sparsekit.solvers]\nlasso = extra_mod:lasso\nbroken = no_such_mod:f\n"
    )
    (tmp_path / "site" / "extra_mod.py").write_text(
        "def stairs(linears, sparsity, groups, dense, *, strength: float = 0.1): ...\n"
        "from sparsekit.contracts import Effect, declares\n"
        "@declares(Effect(moves=True))\ndef lora(context, *, rank: int = 8): ...\n"
        "def lasso(weight, stats, pattern, init=None, *, pair: tuple = (1, 2), iterations: int = 20): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return error.value.problems


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path: Path) -> None:
    recipe = load_recipe(path)
    assert check_options(recipe) == []
    assert recipe.output == f"runs/{path.stem}"
    if recipe.pattern is not None:
        parse(recipe.pattern)
    resolve(recipe.calibration.model_dump(), (*CALIBRATION, "batch"))
    check_evaluation(recipe.evaluate.model_dump(exclude={"dense", "samples"}))


def test_there_are_shipped_recipes() -> None:
    assert {path.stem for path in SHIPPED} >= {"demo", "llama3_2to4", "llama2_50", "opt_50", "mistral_4to8"}


def test_defaults(write: Write) -> None:
    recipe = load_recipe(write(GOOD))
    assert recipe.model.path == "m"
    assert (recipe.model.dtype, recipe.model.trust_remote_code) == ("auto", False)
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.seed) == (128, 2048, 0)
    assert (recipe.error_correction, recipe.seed, recipe.keep, recipe.output) == ("prefix", 0, False, "runs/x")
    assert recipe.memory.activations == 4_000_000_000
    assert recipe.stages == [Stage("wanda")]
    assert recipe.stages[0].line == 5
    assert recipe.allocation == Stage("uniform")
    assert (recipe.evaluate.perplexity, recipe.evaluate.tasks, recipe.evaluate.dense) == ([], [], True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("12:30", "12:30"),
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        ("no", "no"),
        ("010", 10),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("[a, 1]", ["a", 1]),
        ("{a-b: 1}", {"a_b": 1}),
    ],
)
def test_yaml_is_1_2_in_the_file_and_on_the_command_line(write: Write, text: str, value: Any) -> None:
    inside = load_recipe(write(GOOD.replace("- wanda", f"- wanda: {{x: {text}}}"))).stages[0].options
    outside = load_recipe(write(GOOD), [f"stages.0.wanda.x={text}"]).stages[0].options
    assert inside == outside == {"x": value}
    assert type(inside["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["x.yaml: the file is empty"]),
        ("# only a comment\n", ["x.yaml: the file is empty"]),
        ("- a\n", ["x.yaml:1: a recipe is a mapping with model, stages"]),
        ("a: [1\nb: 2\n", ["x.yaml:2: not valid YAML"]),
        ("a: 1\n\tb: 2\n", ["x.yaml:2: not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["x.yaml:2: not valid YAML"]),
        ("{}", ["missing key `model`", "missing key `stages`"]),
            (GOOD.replace("pattern: 2:4\n", ""), ["missing key `pattern`, which `wanda` prunes to"]),
        (GOOD + "patern: 1\n", ["x.yaml:6: unknown key `patern`, did you mean `pattern`? (valid: allocation,"]),
        (GOOD + "pattern: 1\n", ["x.yaml:6: `pattern` is here a second time, the first is at x.yaml:2"]),
        (GOOD + "error-correction: none\nerror_correction: none\n", ["x.yaml:7: `error_correction` is here a second"]),
        (GOOD + "error_correction: prefx\n", ['x.yaml:6: `error_correction` is "prefx", did you mean `prefix`?']),
        (GOOD + "seed: 1.0\n", ["x.yaml:6: `seed` is 1.0, must be a whole number"]),
        (GOOD + "seed: -1\n", ["x.yaml:6: `seed` is -1, must be greater than or equal to 0"]),
        (GOOD + "seed: true\n", ["x.yaml:6: `seed` is true, must be a whole number"]),
        (GOOD + "keep: 1\n", ["x.yaml:6: `keep` is 1, must be true or false"]),
        (GOOD + "output: 7\n", ["x.yaml:6: `output` is 7, must be a text (put it in quotes)"]),
        (GOOD + "output: !!python/object:os.system ls\n", ["x.yaml:6: python/object:os.system is not a value"]),
        (GOOD + "memory: 4GB\n", ['x.yaml:6: `memory` is "4GB", must be a mapping']),
        (GOOD + "memory:\n  activations: 4 G\n", ['x.yaml:7: `memory.activations` is "4 G", must be']),
        (GOOD + "trainer: {strategy: zero}\n", ["x.yaml:6: `trainer.strategy` is \"zero\", and can be auto or ddp"]),
        (GOOD + "trainer: {devices: []}\n", ["x.yaml:6: `trainer.devices` is [], must be how many"]),
        (GOOD + "allocation: owll\n", ["x.yaml:6: unknown allocator `owll`, did you mean `owl`? (valid: dep"]),
        (GOOD + "evaluate: {tasks: [a,\n  1]}\n", ["x.yaml:7: `evaluate.tasks.1` is 1, must be a text"]),
        (GOOD + "evaluate: {tasks: [{nam: a}]}\n", ["unknown key `evaluate.tasks.0.nam`, did you mean `name`?"]),
        (GOOD + "evaluate: {tasks: [a.yaml]}\n", ["x.yaml:6: there is no file a.yaml"]),
        (GOOD + "evaluate:\n  perplexity:\n    - ptb\n    - wikitxt2\n", ["x.yaml:9: unknown source `wikitxt2`, did"]),
        (GOOD + "evaluate: {perplexity: [no.txt]}\n", ["x.yaml:6: there is no file no.txt"]),
        (GOOD + "evaluate: {perplexity: [ptb, ptb]}\n", ["x.yaml:6: several perplexity sets are called `ptb`"]),
        (GOOD.replace("python-docs", "{a: 1}"), ['`calibration.source` is {"a": 1}, must be a text']),
        (GOOD.replace("python-docs", "pyton-docs"), ["x.yaml:3: unknown source `pyton-docs`, did you mean `python-"]),
        (GOOD.replace("- wanda", "- wandaa"), ["x.yaml:5: unknown method `wandaa`, did you mean `wanda`?"]),
        (GOOD.replace("- wanda", "- wanda: 3"), ["x.yaml:5: `wanda` has 3, must have a mapping of options"]),
        (GOOD.replace("- wanda", "- {wanda: {}, refit: {}}"), ["x.yaml:5: `stages.0` is", "must be a name, or one"]),
        (GOOD.replace("\n  - wanda", " []"), ["x.yaml:4: `stages` is [], must be at least one"]),
        (GOOD.replace("\n  - wanda", " wanda"), ['x.yaml:4: `stages` is "wanda", must be a list']),
        (GOOD.replace("model: m", "model: {}"), ["x.yaml:1: missing key `model.path`"]),
        (GOOD.replace("model: m", "model: {path: m, dtype: bf16}"), ["did you mean `bfloat16`?"]),
        (GOOD.replace("model: m", "model: [m]"), ['x.yaml:1: `model` is ["m"], must be a mapping']),
        (GOOD.replace("2:4", "4:2"), ['x.yaml:2: `pattern` is "4:2", must be the share to remove']),
        (GOOD + "a: &x [*x]\n", ["nested too deeply"]),
    ],
)  # fmt: skip
def test_mistakes_have_a_place_and_a_remedy(write: Write, text: str, said: list[str]) -> None:
    found = "\n".join(problems(write(text)))
    for part in said:
        assert part in found


def test_all_mistakes_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = "model: {path: m, x: 1}\npattern: 5:4\nstages:\n  - wandaa\n  - refit\n  - refi\nsed: 1\nseed: x\nseed: y\n"
    found = problems(write(text), "keep=1", "foo")
    assert [problem.split(": ")[0] for problem in found] == [
        *("x.yaml:1", "x.yaml:2", "x.yaml:4", "x.yaml:6", "x.yaml:7", "x.yaml:8", "x.yaml:9"),
        *("--set foo", "--set keep=1"),
    ]


def test_no_file(write: Write) -> None:
    assert problems(Path("nowhere.yaml")) == ["nowhere.yaml: no such file"]
    assert problems(Path()) == [".: not a file"]
    write("").write_bytes(b"\xff\xfe\xff")
    assert problems(Path("x.yaml")) == ["x.yaml: not a text in UTF-8"]


@pytest.mark.parametrize(
    ("overrides", "look", "value"),
    [
        (["calibration.samples=8"], lambda r: r.calibration.samples, 8),
        (["pattern=4:8"], lambda r: r.pattern, "4:8"),
        (["pattern=0.5"], lambda r: r.pattern, "0.5"),
        (["model.dtype=float32"], lambda r: (r.model.path, r.model.dtype), ("m", "float32")),
        (["model=n"], lambda r: r.model.path, "n"),
        (["stages.0=magnitude"], lambda r: r.stages, [Stage("magnitude")]),
        (["stages.1=refit", "stages.1.refit.damping=1e-4"], lambda r: r.stages[1], Stage("refit", {"damping": 1e-4})),
        (["stages=[sparsegpt]", "stages.0.sparsegpt.damping=0.1"], lambda r: r.stages[0].options, {"damping": 0.1}),
        (["evaluate.perplexity=[wikitext2]"], lambda r: [t.source for t in r.evaluate.perplexity], ["wikitext2"]),
        (["evaluate.perplexity.0=ptb", "evaluate.perplexity.0.windows=2"],
         lambda r: (r.evaluate.perplexity[0].source, r.evaluate.perplexity[0].windows), ("ptb", 2)),
        (["error-correction=none"], lambda r: r.error_correction, "none"),
        (["memory.activations=1.5 GiB"], lambda r: r.memory.activations, 3 * 2**29),
        (["allocation.uniform={}"], lambda r: r.allocation, Stage("uniform")),
        (["output=a=b"], lambda r: r.output, "a=b"),
        (["calibration={source: c4}"], lambda r: r.calibration.source, "c4"),
        (["trainer.devices=[0]", "keep=true"], lambda r: (r.trainer.devices, r.keep), ([0], True)),
    ],
)  # fmt: skip
def test_overrides(write: Write, overrides: list[str], look: Callable[[Recipe], Any], value: Any) -> None:
    assert look(load_recipe(write(GOOD), overrides)) == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("calibration.samples", "--set calibration.samples: must be key=value"),
        ("=3", "--set =3: must be key=value"),
        ("a..b=3", "--set a..b=3: must be key=value"),
        ("calibration.samples=x", '--set calibration.samples=x: `calibration.samples` is "x", must be a whole number'),
        ("calibation.samples=8", "--set calibation.samples=8: unknown key `calibation`, did you mean `calibration`?"),
        ("stages.3=wanda", "--set stages.3=wanda: `stages` is a list, write an index from 0 to 1 in place of `3`"),
        ("stages.x=wanda", "--set stages.x=wanda: `stages` is a list, write an index"),
        ("pattern.x=1", '--set pattern.x=1: `pattern` is "2:4", which has nothing called `x` inside'),
        ("stages.0.refit.damping=1", "--set stages.0.refit.damping=1: `stages.0` is `wanda`, not `refit`"),
        ("stages.0=wandaa", "--set stages.0=wandaa: unknown method `wandaa`, did you mean `wanda`?"),
        ("pattern=[", "--set pattern=[: not valid YAML"),
        ("evaluate.perplexity.0=no.jsonl", "--set evaluate.perplexity.0=no.jsonl: there is no file no.jsonl"),
    ],
)
def test_mistakes_in_overrides(write: Write, override: str, said: str) -> None:
    assert any(problem.startswith(said) for problem in problems(write(GOOD), override))


def test_an_override_mends_the_file(write: Write) -> None:
    assert load_recipe(write(GOOD.replace("wanda", "wandaa")), ["stages.0=wanda"]).stages[0].line is None


PATTERNS = ["50%", "2:4", "4:8", "12.5%", "0%", "100%", "0.5", "50", "1:1", "0:4", "4:2", "half", "%", "2:", "-1%",
            "99.9%", "2 : 4", " 50 %", "1", "0", ".5", "1.5", "nan", "5e1%"]  # fmt: skip


@pytest.mark.parametrize("text", PATTERNS)
def test_patterns_are_judged_as_by_the_pattern_module(write: Write, text: str) -> None:
    """The oracle is sparsekit.pattern.parse, which needs torch. What it takes in words of science may be refused."""
    path = write(GOOD.replace("2:4", f'"{text}"'))
    try:
        parse(text)
    except ValueError:
        assert "`pattern` is" in problems(path)[0]
    else:
        if "e" not in text:
            assert parse(load_recipe(path).pattern) == parse(text)


def test_a_number_is_a_pattern_too(write: Write) -> None:
    assert parse(load_recipe(write(GOOD.replace("2:4", "0.625"))).pattern) == parse(0.625)


def test_local_files(write: Write) -> None:
    Path("my.txt").write_text("words")
    text = (
        GOOD.replace("python-docs", "my.txt")
        + "evaluate: {perplexity: [my.txt, {source: text, path: my.txt, name: b}]}\n"
    )
    recipe = load_recipe(write(text))
    assert (recipe.calibration.source, recipe.calibration.options) == ("text", {"path": "my.txt"})
    assert [t.called for t in recipe.evaluate.perplexity] == ["my.txt", "b"]
    assert check_options(recipe) == []
    settings = resolved(recipe)["evaluate"]
    check_evaluation({key: value for key, value in settings.items() if key not in ("dense", "samples")})


def option_problems(path: Path, *overrides: str) -> list[str]:
    return check_options(load_recipe(path, overrides))


def test_options(write: Write, plugin: None) -> None:
    text = GOOD.replace("python-docs", "python-docs, sampels: 4").replace(
        "  - wanda\n", "  - sparsegpt:\n      dampng: 1\n      block: x\n"
    )
    found = option_problems(write(text), "calibration.batch=2")
    assert found[0].startswith(
        "x.yaml:3: source `python-docs`: unknown option `sampels`, did you mean `samples`? (valid: b"
    )
    assert found[1].startswith("x.yaml:6: stage 1, `sparsegpt`: unknown option `dampng`, did you mean `damping`?")
    assert found[2].startswith('x.yaml:7: stage 1, `sparsegpt`: option `block` is "x", must be a whole number')
    assert len(found) == 3
    found = option_problems(write(GOOD), "stages=[{lo-ra: {rank: x}}]", "pattern=50%", "allocation.stairs.strenth=1")
    assert found == [
        "--set allocation.stairs.strenth=1: allocation `stairs`: unknown option `strenth`, did you mean `strength`? "
        "(valid: strength)",
        '--set stages=[{lo-ra: {rank: x}}]: stage 1, `lo-ra`: option `rank` is "x", must be a whole number',
    ]


def test_options_of_sources(write: Write) -> None:
    found = option_problems(write(GOOD), "evaluate.perplexity=[{source: jsonl, feld: x}]", "calibration={source: text}")
    assert found == [
        "--set calibration={source: text}: source `text`: option `path` is required",
        "--set evaluate.perplexity=[{source: jsonl, feld: x}]: source `jsonl`: unknown option `feld`, did you mean "
        "`field`? (valid: field, length, name, pack, path, separator, source, windows)",
        "--set evaluate.perplexity=[{source: jsonl, feld: x}]: source `jsonl`: option `path` is required",
    ]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[wanda, refit]", None),
        ("[wanda, lasso, refit]", None),
        ("[lasso]", None),
        ("[wanda, lo_ra]", None),
        ("[wanda, sparsegpt]", "stage 2, `sparsegpt`, cannot start from the answer of `wanda`, which would be thrown"),
        ("[wanda, refit, wanda]", "stage 3, `wanda`, cannot start from the answer of `refit`"),
        ("[refit]", "stage 1, `refit`, only improves the answer of an earlier stage"),
        ("[broken]", "stage 1, `broken`: `broken` of extra 1.0 cannot be imported"),
    ],
)
def test_order_of_stages(write: Write, plugin: None, stages: str, said: str | None) -> None:
    found = option_problems(write(GOOD), f"stages={stages}")
    assert found == [] if said is None else [p.startswith(f"--set stages={stages}: {said}") for p in found] == [True]


def test_stage_or_solver(write: Write, plugin: None) -> None:
    assert [kind(stage) for stage in load_recipe(write(GOOD), ["stages.1=lo_ra"]).stages] == ["solver", "stage"]
    assert load_recipe(write(GOOD), ["stages.1=lo_ra"]).stages[1].name == "lo-ra"


def test_every_pattern_goes_with_every_rule(write: Write, plugin: None) -> None:
    path = write(GOOD + "allocation:\n  stairs: {strength: 0.2}\n")
    for pattern in ("2:4", "50%"):
        assert load_recipe(path, [f"pattern={pattern}"]).allocation == Stage("stairs", {"strength": 0.2})


def test_what_a_rule_is_given_is_no_option(write: Write, plugin: None) -> None:
    found = option_problems(write(GOOD), "allocation={stairs: {dense: 1, groups: 2}}")
    said = "--set allocation={stairs: {dense: 1, groups: 2}}: allocation `stairs`: unknown option"
    assert found == [f"{said} `{name}`, valid: strength" for name in ("dense", "groups")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_resolved_recipes_replay(path: Path, write: Write) -> None:
    first = resolved(load_recipe(path))
    assert resolved(load_recipe(write(to_yaml(first)))) == first
    assert check_options(load_recipe(Path("x.yaml"))) == []
    assert first["trainer"].items() >= {"accelerator": "auto", "devices": 1, "num_nodes": 1, "callbacks": []}.items()


def test_resolved_fills_in_options(write: Write, plugin: None) -> None:
    plain = resolved(
        load_recipe(write(GOOD), ["stages.1.lasso={}", "stages.2.refit.damping=0.5", "calibration.source=c4"])
    )
    assert plain["stages"][1] == {"lasso": {"pair": [1, 2], "iterations": 20}}
    assert plain["stages"][2]["refit"]["damping"] == 0.5
    assert (
        plain["stages"][2]["refit"]["iterations"]
        == registry.options(registry.load("solvers", "refit"))["iterations"].default
    )
    assert plain["calibration"]["pack"] is False
    assert 'pattern: "2:4"' in to_yaml(plain)


def test_schema_knows_the_installed_names(plugin: None) -> None:
    whole = json_schema()
    names, full = whole["properties"]["stages"]["items"]["anyOf"]
    assert {"wanda", "refit", "lo-ra", "lasso"} <= set(names["enum"])
    assert set(full["properties"]["refit"]["properties"]) == {"damping", "ridge", "iterations", "tolerance", "targets"}
    rules, full = whole["properties"]["allocation"]["anyOf"]
    assert {"owl", "stairs", "uniform"} <= set(rules["enum"])
    assert set(full["properties"]["owl"]["properties"]) == {"threshold", "spread"}
    assert "wikitext2" in whole["$defs"]["Calibration"]["properties"]["source"]["anyOf"][0]["enum"]
    assert whole["required"] == ["model", "stages"]
    assert set(whole["properties"]) == set(names_of(Recipe))


def test_structure_is_checked_without_torch(write: Write) -> None:
    code = (
        "import sys; from sparsekit.recipe import *\n"
        "load_recipe('x.yaml')\n"
        "try: load_recipe('x.yaml', ['stages.0=wandaa', 'x=1'])\n"
        "except RecipeError as error: assert len(error.problems) == 2\n"
        "json_schema()\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'datasets') if name in sys.modules])"
    )
    write(GOOD)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_options_are_checked_without_the_heavy_libraries(write: Write) -> None:
    code = (
        "import sys; from sparsekit.recipe import *; check_options(load_recipe('x.yaml'))\n"
        "print([name for name in ('lightning', 'transformers', 'datasets', 'lm_eval') if name in sys.modules])"
    )
    write(GOOD)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for definition in [json_schema(), *json_schema()["$defs"].values()]:
        for key in definition["properties"]:
            assert f"`{key}`" in page, key


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{max_epochs: 3}", "`trainer.max_epochs` would end a walk before its last block"),
        ("{limit_train_batches: 2}", "`trainer.limit_train_batches` would leave blocks out"),
        ("{strategy: deepspeed}", '`trainer.strategy` is "deepspeed", and can be auto or ddp'),
        ("{precision: 16}", "`trainer.precision` is 16, valid: 16-mixed, 32-true, bf16-mixed"),
        ("{gradient_clip_val: 0.0}", "`trainer.gradient_clip_val` is 0.0, must be greater than 0"),
        ("{callbacks: [{class_path: Timer}]}", '`trainer.callbacks.0.class_path` is "Timer", must be package'),
        ("{callbacks: [{class: a.B}]}", "unknown key `trainer.callbacks.0.class`, did you mean `class_path`"),
    ],
)
def test_what_a_trainer_may_not_be_given(given: str, said: str, write: Write) -> None:
    assert any(said in each for each in problems(write(GOOD + f"trainer: {given}\n"))), problems(Path("x.yaml"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sparsity": 0.5}, 'here write `pattern: "50%"`'),
        ({"stages": [{"lora": {"lora_alpha": 16}}]}, "which is peft's word: here write `alpha: 16`"),
        ({"calibration": {"source": "python-docs", "nsamples": 8}}, "here write `samples: 128`"),
        ({"stages": [{"finetune": {"max_steps": 9}}]}, "trainers: here write `steps: 100`"),
        ({"output_dir": "x"}, "here write `output: runs/mine`"),
    ],
)
def test_words_of_other_libraries(given, said):
    """Who comes from peft, trl, llm-compressor or the papers' code is told the line to write."""
    with pytest.raises(ValueError, match=re.escape(said)):
        check = load_recipe({"model": "x", "pattern": "50%", "stages": ["wanda"], **given})
        raise RecipeError(check_options(check))


def test_a_plugin_that_is_not_installed():
    """Its package is named, and how to have it."""
    from sparsekit.contracts import said_elsewhere

    assert said_elsewhere("ria", []).startswith("which is in the package sparsekit-ria: ")
    assert said_elsewhere("ria", []).endswith("pip install ./plugins/sparsekit-ria")
    assert said_elsewhere("patern", ["pattern"]) == "" and said_elsewhere("r", ["pattern"]) == ""
    for package in (Path(__file__).parents[1] / "plugins").iterdir():
        assert package.name in said_elsewhere(package.name.removeprefix("sparsekit-"), [])
