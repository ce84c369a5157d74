"""The benchmarks that compare methods: layer by layer, and as papers' tables."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekit import registry
from sparsekit.data import Corpus, sample
from sparsekit.data.corpora import python_docs
from sparsekit.maths import Stats, parse
from sparsekit.solvers.sparsegpt import sparsegpt

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks import captured, layerwise, leaderboard, solvers, structures
from benchmarks.tables import __main__ as runner
from benchmarks.tables import rows as paper

TINY = Path(__file__).parent / "models" / "tiny-llama"
NUMBERS = [(name, number) for name in paper.papers() for number in paper.tables(name)]


# Papers' tables


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_every_row_of_every_table_is_a_recipe_that_can_be_run(name: str, number: str) -> None:
    described = paper.table(name, number)
    if any("bonsai" in setting for row in described["rows"] for setting in row.get("set", [])):
        pytest.importorskip("sparsekit_bonsai")
    found = paper.rows(name, number)  # load_recipe and check_options, or RecipeError
    swept = described.get("sweep", {}).get("values", [""])
    assert len(found) == sum(1 if row.get("dense") else len(row.get("values", swept)) for row in described["rows"])
    assert len({(row.label, row.folder) for row in found}) == len(found)
    first = described["models"][0]
    for row in found:
        assert row.recipe.model.path == first["name"]
        if "length" in first:
            assert row.recipe.calibration.length == row.recipe.evaluate.length == first["length"]
        if described.get("sweep", {}).get("key") == "remove":
            assert row.dense or row.recipe.stages[0].options["remove"] == row.swept
            assert row.recipe.pattern is None
        else:
            assert row.dense or row.recipe.pattern == (row.pattern or row.swept)


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_a_row_has_a_figure_for_every_model(name: str, number: str) -> None:
    described = paper.table(name, number)
    for row in described["rows"]:
        assert len(row["paper"]) == len(described["models"]), row["method"]
        for entry in row["paper"]:
            if entry is None:
                continue
            if isinstance(entry, dict):
                assert entry.keys() <= set(row.get("values", described["sweep"]["values"])), row["method"]
            for each in entry.values() if isinstance(entry, dict) else [entry]:
                figures = each if isinstance(each, list) else [each]
                assert len(figures) == len(described["figures"]), row["method"]
                assert all(isinstance(figure, float | int | None) for figure in figures), row["method"]


@pytest.mark.parametrize(("name", "number"), [("fistapruner", "5"), ("lamp", "3"), ("lamp", "8")])
def test_the_means_a_paper_prints_are_those_of_its_tasks(name: str, number: str) -> None:
    for row in paper.table(name, number)["rows"]:
        *tasks, mean = row["paper"][0]
        if (number, row["method"], mean) != ("3", "LAMP", 0.5696):  # printed so
            assert sum(tasks) / len(tasks) == pytest.approx(mean, abs=2e-4), row["method"]


@pytest.mark.parametrize("number", ["1", "A3", "A4", "A5", "A6", "A12"])
def test_the_means_of_every_share_are_those_of_its_tasks(number: str) -> None:
    for row in paper.table("policy_gradient", number)["rows"]:
        entry = row["paper"][0]
        for _, *tasks, mean in entry.values() if isinstance(entry, dict) else [entry]:
            assert sum(tasks) / len(tasks) == pytest.approx(mean, abs=1.01e-4), row["method"]


def test_figures_belong_to_the_model_they_were_printed_for() -> None:
    found = paper.rows("fistapruner", "1", "copies/OPT-1.3b")
    assert found[0].paper == {"wikitext2": 14.63}
    assert found[-1].label == "FISTAPruner 2:4"
    assert found[-1].paper == {"wikitext2": 22.46}
    assert all(row.paper == {} for row in paper.rows("fistapruner", "1", "another/model"))
    swept = {row.label: row.paper for row in paper.rows("fistapruner", "figure-3a")}
    assert swept["FISTAPruner 20%"] == {"wikitext2": 27.36}
    assert swept["Wanda 20%"] == {}
    lost = {row.label: row.paper for row in paper.rows("sparsellm", "1", "facebook/opt-66b")}
    assert lost["Wanda 70%"] == {}
    assert lost["SparseLLM 70%"] == {"ptb": 13.66, "c4": 11.37}


def test_a_swept_value_stands_where_the_settings_have_a_dollar() -> None:
    found = {row.label: row for row in paper.rows("policy_gradient", "2", wanted=["wanda-sp", "progressive"])}
    assert found["Wanda-sp 40%"].recipe.stages[0].options == {"remove": "40%"}
    assert found["Wanda-sp 40%"].paper == {"wikitext2": 78.45}
    late = found["Policy gradient, random-progressive start 50%"]
    assert (late.recipe.stages[0].options["remove"], late.recipe.stages[0].options["steps"]) == ("50%", 50000)
    assert late.paper == {"wikitext2": 86.55}


def test_settings_of_a_method_hold_for_the_rows_that_have_it() -> None:
    rows = {
        row.label: row.recipe.stages[0].options
        for row in paper.rows(
            "policy_gradient",
            "matrix",
            settings=["seed=3", "stages.0.wanda-sp.damping=0.5", "stages.0.policy_gradient.group=8"],
            wanted=["wanda-sp 30%", "flap 30%", "gradient 30%"],
        )
    }
    assert rows["Wanda-sp 30%"] == {"remove": "30%", "damping": 0.5}
    assert rows["FLAP 30%"] == {"remove": "30%"}
    assert rows["Policy gradient 30%"]["group"] == 8
    with pytest.raises(ValueError, match="no row has the method that stages"):
        paper.rows("policy_gradient", "ablations", settings=["stages.0.slicer.cut=1"], wanted=["per layer"])


def test_equal_runs_share_a_folder_and_others_do_not() -> None:
    def folders(number: str, *settings: str) -> dict[str, str]:
        found = paper.rows("fistapruner", number, "facebook/opt-125m", settings)
        return {row.label: row.folder for row in found}

    table, figure = folders("1"), folders("figure-3a")
    assert table["SparseGPT 50%"] == figure["SparseGPT 50%"]
    assert table["Dense"] == figure["Dense"]
    assert table["SparseGPT 50%"] != folders("1", "calibration.seed=1")["SparseGPT 50%"]
    assert table["Dense"] == folders("1", "calibration.seed=1")["Dense"]
    assert table["Dense"] != folders("1", "evaluate.length=1024")["Dense"]


@pytest.fixture
def story(tmp_path: Path) -> list[str]:
    """Settings for a small text that differs for calibration and test."""
    for part, split in (("calibration", "calibration"), ("test", "test")):
        text = "\n".join(python_docs(split).documents)[: 40_000 if part == "calibration" else 6_000]
        (tmp_path / f"{part}.txt").write_text(text, encoding="utf-8")
    return [
        f"calibration={{source: text, path: {tmp_path}/calibration.txt, samples: 4, length: 64}}",
        f"evaluate.perplexity=[{{source: text, path: {tmp_path}/test.txt, name: small}}]",
        "evaluate.length=64",
        "trainer.accelerator=cpu",
    ]


def test_a_table_is_run_once(story: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tables"
    command = ["fistapruner", "--table", "1", "--model", str(TINY), "--output", str(output), "--markdown"]
    command += ["--rows", "dense", "wanda 2:4", "--set", *story]
    assert runner.main(command) == 0
    printed = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert lines[0] == ["method", "sparsity", "small, paper", "small"]
    assert [line[:2] for line in lines[2:]] == [["Dense", "dense"], ["Wanda", "2:4"]]
    dense, pruned = (float(line[-1]) for line in lines[2:])
    assert 1 < dense < pruned < 768  # the vocabulary

    reports = sorted(output.rglob("report.json"))
    assert len(reports) == 2
    report = json.loads(next(file for file in reports if "wanda" in str(file)).read_text())
    assert report["evaluation"]["pruned"]["perplexity"]["small"] == pytest.approx(pruned, abs=0.005)
    assert report["sparsity"]["total"] == 0.5
    times = [file.stat().st_mtime_ns for file in reports]
    assert runner.main(command) == 0
    assert capsys.readouterr().out == printed
    assert [file.stat().st_mtime_ns for file in reports] == times


def test_an_interrupted_row_is_resumed(
    story: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fistapruner", "--table", "1", "--model", str(TINY), "--output", str(tmp_path / "tables")]
    command += ["--rows", "wanda 2:4", "--markdown", "--set", *story]

    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr("sparsekit.run.result.verify", full)
        assert runner.main(command) == 1
    assert "failed: Wanda 2:4: the disk is full" in capsys.readouterr().err
    with monkeypatch.context() as broken:  # the blocks are on disk: nothing is solved again
        broken.setattr("sparsekit.walk.walk.OneShot._solve", full)
        assert runner.main(command) == 0
    assert "| Wanda | 2:4 |" in capsys.readouterr().out


def test_a_row_that_fails_does_not_stop_the_others(
    story: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(row: paper.Row, output: Path) -> dict:
        if row.method == "Wanda":
            raise ValueError("no such text")
        return {"evaluation": {"pruned": {"perplexity": {"small": 7.0}, "tasks": {}}}, "verified": ["it is dense"]}

    monkeypatch.setattr(runner, "measured", measured)
    command = ["fistapruner", "--table", "1", "--model", str(TINY), "--markdown", "--rows", "50%", "--set", *story]
    assert runner.main(command) == 1
    said = capsys.readouterr()
    assert "| Wanda | 50% |  |  |" in said.out
    assert "| FISTAPruner | 50% |  | 7.00 |" in said.out
    assert "failed: Wanda 50%: no such text" in said.err
    assert "failed: SparseGPT 50% did not verify: it is dense" in said.err


def test_seeds_are_averaged_and_what_should_hold_is_said(
    story: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random masks are real; the figures of the others, which would take minutes, are made up."""
    real, made = runner.measured, {"Per layer": 40.0, "Moving average": 30.0, "No baseline": 29.0}

    def measured(row: paper.Row, output: Path) -> dict:
        if row.method == "Random masks":
            return real(row, output)
        figure = made.get(row.method, 35.0) + row.recipe.seed
        return {"evaluation": {"pruned": {"perplexity": {"small": figure}, "tasks": {}}}, "verified": True}

    monkeypatch.setattr(runner, "measured", measured)
    command = [str(TINY), "--markdown", "--output", str(tmp_path / "runs"), "--seeds", "0", "2"]
    command += ["--rows", "random masks 50%", "wanda-sp 50%", "--ablation-seeds", "0", "2"]
    command += ["--policy", "length=32", "tokens=256", "--set", *story]
    assert structures.main(command) == 1  # no baseline is better here
    said = capsys.readouterr().out
    lines = {line.strip("| ").partition(" |")[0]: line for line in said.splitlines() if line.startswith("| ")}
    assert lines["Per layer"].strip("| ").split(" | ")[2] == "41.00 ± 1.41"
    assert float(lines["Random masks"].strip("| ").split(" | ")[-1].split()[0]) == pytest.approx(0.5, abs=0.03)
    assert "MISSED: Moving average against No baseline at 50%: 31.00, 30.00" in said
    assert "holds: Policy gradient against Per layer at 50%: 36.00, 41.00" in said
    assert "LLM-Pruner" not in said  # not measured, so nothing is claimed of it


def test_sizes_are_those_of_the_report() -> None:
    structure = {"removed": [0.3, 0.1], "parameters": {"dense": 7_000_000_000, "pruned": 4_837_000_000}}
    assert runner.sizes({"structure": structure}) == {"removed": 0.3, "billions": 4.837}
    assert runner.sizes({}) == {}


def test_accuracies_have_a_mean() -> None:
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.1, "n": 4}, "b": {"acc": 0.7, "acc_norm": 0.9}}
    found = runner.figures({"perplexity": {"w": 3.0}, "tasks": tasks})
    assert found == {"w": 3.0, "a": 0.5, "b": 0.7, "mean": pytest.approx(0.6)}


def test_objectives_are_those_after_each_epoch_of_a_pruned_block() -> None:
    blocks = {f"layers.{i}": {"sparsellm": {"objectives": [3 + i, 2 + i, 1 + i, 0.3, 0.2, 0.1]}} for i in range(3)}
    assert runner.objectives(blocks, 1) == {"epoch 1": 2, "epoch 2": 0.1}
    assert runner.objectives(blocks | {"layers.3": {}}, 3) == {"epoch 1": 3, "epoch 2": 0.1}
    assert runner.objectives({}, 3) == {}


def test_what_prunes_half_of_the_blocks_prunes_half_in_every_row() -> None:
    for number in paper.tables("sparsellm"):
        for row in paper.rows("sparsellm", number):
            assert row.dense or row.recipe.stages[0].options["first_half_only"] is True


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["fistapruner", "--table", "7"], "no table `7`"),
        (["fistapruners", "--table", "1"], "did you mean `fistapruner`"),
        (["fistapruner", "--table", "1", "--rows", "Wandaa"], "no row has `Wandaa`"),
        (["fistapruner", "--table", "1", "--set", "patern=2:4"], "did you mean `pattern`"),
    ],
)
def test_mistakes_are_told_in_a_sentence(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(command) == 2
    assert said in capsys.readouterr().err


# Layer by layer


def test_layerwise_agrees_with_a_direct_computation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, cache = tmp_path / "figures.json", tmp_path / "layers.safetensors"
    command = ["--model", str(TINY), "--blocks", "1", "--patterns", "2:4", "--solvers", "wanda", "sparsegpt"]
    command += ["--samples", "6", "--held-out", "3", "--length", "64", "--json", str(file), "--cache", str(cache)]
    assert layerwise.main(command) == 0
    records = {record["solver"]: record for record in json.loads(file.read_text())["records"]}
    assert records.keys() == {"wanda", "sparsegpt"}

    # The oracle: the model's own forward pass, hooks on the linears, and sums of squared outputs in float64.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)
    tokens = [
        sample(Corpus(python_docs(part).documents), tokenizer, samples=count, length=64, seed=0)
        for part, count in (("calibration", 6), ("test", 3))
    ]
    linears = [f"model.layers.1.{name}" for name in _names(model.model.layers[1])]
    assert records["sparsegpt"]["linears"].keys() == set(linears)
    ratios = []
    for name in linears:
        seen, other = (_inputs(model, name, each) for each in tokens)  # (tokens, in)
        weight = model.get_submodule(name).weight.detach()
        solved = sparsegpt(weight, Stats.of(seen), parse("2:4"))
        figures = records["sparsegpt"]["linears"][name]
        assert figures["error"] == pytest.approx(_error(solved, weight, seen), rel=1e-3)
        assert figures["held_out"] == pytest.approx(_error(solved, weight, other), rel=1e-3)
        ratios.append(records["wanda"]["linears"][name]["held_out"] / figures["held_out"])
    assert records["wanda"]["mean_of_ratios"] == pytest.approx(sum(ratios) / len(ratios))
    assert records["wanda"]["mean_of_ratios"] > 1
    assert records["sparsegpt"]["mean_of_ratios"] == records["sparsegpt"]["ratio_of_means"] == 1
    assert records["wanda"]["sparsity"] == 0.5

    first = capsys.readouterr().out
    again = tmp_path / "again.json"
    assert layerwise.main([*command[:-3], str(again), *command[-2:]]) == 0  # from the cache now
    for record in json.loads(again.read_text())["records"]:
        assert record["held_out"] == records[record["solver"]]["held_out"]
    assert f"{records['sparsegpt']['held_out']:.5f}" in first
    assert layerwise.main([*command, "--seed", "1"]) == 2
    assert "holds layers of other settings" in capsys.readouterr().err


def _names(block: torch.nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]


@torch.no_grad()
def _inputs(model: torch.nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=tokens)
    hook.remove()
    return torch.cat(seen)


def _error(solved: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    x, dense = inputs.double(), weight.double()
    return float((x @ (solved.double() - dense).t()).square().sum() / (x @ dense.t()).square().sum())


def test_what_is_held_out_was_not_calibrated_on(tmp_path: Path) -> None:
    calibration, held_out = captured.split("python-docs")
    assert not set(calibration.documents) & set(held_out.documents)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(10)))
    calibration, held_out = captured.split(str(file))
    assert list(calibration.documents) == [f"document {number}" for number in range(8)]
    assert list(held_out.documents) == ["document 8", "document 9"]
    assert calibration.sampling == held_out.sampling == "documents"
    file.write_text('{"text": "alone"}')
    with pytest.raises(ValueError, match="is one document"):
        captured.split({"source": "jsonl", "path": str(file)})


def test_every_installed_solver_is_there_and_none_begins_that_cannot() -> None:
    named = solvers.installed()
    assert {part for name in named for part in name.split("+")} == set(registry.names("solvers"))
    assert {"wanda+refit", "sparsegpt+refit", "wanda+swaps", "sparsegpt+swaps"} <= set(named)
    for name in named:
        solvers.from_text(name)


def test_options_and_chains_are_read_as_a_recipe_would() -> None:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    stats, pattern = Stats.of(inputs), parse("2:4")
    heavy = solvers.from_text("sparsegpt:damping=1e+2,block=8")(weight, stats, pattern)
    assert torch.equal(heavy, sparsegpt(weight, stats, pattern, damping=100.0, block=8))
    listed = "magnitude+fista:search=arithmetic,bracket=[0.0, 1.0e+6],penalty=1e-5,epsilon=0.0+refit"
    assert pattern.satisfied(solvers.from_text(listed)(weight, stats, pattern))
    recipe = Path(__file__).parents[1] / "recipes" / "mistral_4to8.yaml"
    assert torch.equal(
        solvers.from_recipe(str(recipe))(weight, stats, pattern),
        solvers.from_text("wanda+refit:iterations=100")(weight, stats, pattern),
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandaa", "did you mean `wanda`"),
        ("refit", "write wanda\\+refit"),
        ("sparsegpt:dampng=1", "did you mean `damping`"),
        ("sparsegpt:block=x", "must be a whole number"),
        ("sparsegpt:block", "must be key=value"),
        ("refit+wanda", "only improves"),
        ("sparsegpt+wanda", "can only begin a chain"),
    ],
)
def test_solvers_that_cannot_be_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        solvers.from_text(name)


def test_a_refusing_solver_costs_nobody_else_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    group = captured.Group({"a": weight}, Stats.of(inputs), Stats.of(inputs))

    def refuse(weight: torch.Tensor, stats: Stats, pattern: object) -> torch.Tensor:
        raise ValueError("not for this layer")

    records = layerwise.compare({"refuse": refuse, "wanda": solvers.from_text("wanda")}, [group], ["50%"])
    assert [record["solver"] for record in records] == ["sparsegpt", "refuse", "wanda"]
    assert records[1]["failed"] == "not for this layer"
    assert len({len(layerwise.cells(record)) for record in records}) == 1


def test_linears_of_a_group_share_a_cache_and_solvers_do_not() -> None:
    computed: list[str] = []

    def solver(weight: torch.Tensor, stats: Stats, pattern: object) -> torch.Tensor:
        stats.cached("key", lambda: computed.append("once"))
        return weight

    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    group = captured.Group({"a": torch.ones(2, 4), "b": torch.ones(3, 4)}, Stats.of(inputs), Stats.of(inputs))
    for times in (1, 2):
        layerwise.measure(solver, [group], parse("50%"))
        assert len(computed) == times


def test_a_leaderboard_goes_on_where_it_was_and_writes_its_page(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(leaderboard, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(leaderboard, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{leaderboard.BEGIN}old\n{leaderboard.END}after\n")
    command = [str(models / "tiny-llama"), "--name", "tiny", "--patterns", "50%", "--calibration", "python-docs"]
    command += ["--text", "python-docs", "--samples", "4", "--length", "32", "--windows", "3", "--window", "64"]
    monkeypatch.setattr(leaderboard, "print", lambda *_, **__: None, raising=False)
    ran = []
    real = leaderboard.run
    monkeypatch.setattr(leaderboard, "run", lambda *given: ran.append(given[1:]) or real(*given))
    leaderboard.main([*command, "--methods", "dense", "sparsegpt"])
    leaderboard.main([*command, "--methods", "dense", "sparsegpt", "wanda"])
    assert ran == [("dense", ""), ("sparsegpt", "50%"), ("wanda", "50%")]
    page = (tmp_path / "page.md").read_text()
    assert "| 50% | sparsegpt | one-shot |" in page and "(1.00)" in page and "4 x 32 tokens of python-docs" in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| `sparsegpt` | one-shot |" in readme and "dense " in readme
    assert str(models) not in page + "".join(file.read_text() for file in (tmp_path / "rows").glob("*/*.json"))


def test_a_leaderboard_asks_tasks(shared, models, tmp_path, monkeypatch):
    """A row without them is run again, tasks have a table of their own, and its means are of what the rows hold."""
    folder = shared / "data/zeroshot"
    if not folder.is_dir():
        pytest.skip("the zero-shot sets are not here")
    for name in ("ROWS", "PAGE", "README"):
        monkeypatch.setattr(leaderboard, name, tmp_path / name.lower())
    (tmp_path / "readme").write_text("nothing")
    monkeypatch.setattr(leaderboard, "print", lambda *_, **__: None, raising=False)
    command = [str(models / "tiny-llama"), "--name", "tiny", "--methods", "dense", "--text", "python-docs"]
    command += ["--windows", "3", "--window", "64"]
    leaderboard.main(command)
    assert "zero-shot" not in (tmp_path / "page").read_text()
    leaderboard.main([*command, "--zeroshot", str(folder), "--items", "3"])
    [row] = leaderboard.rows()
    assert list(row["figures"]) == ["python-docs"] and row["items"] == 3
    assert list(row["tasks"]) == ["arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "rte"]
    mean = sum(task["value"] for task in row["tasks"].values()) / 6
    assert f"| {100 * mean:.1f} ± " in (tmp_path / "page").read_text()
    assert all(task["n"] == 3 for task in row["tasks"].values() if "n" in task)
