"""`sparsekit compare`: order and figures of the table, and the refusal of runs that were not measured alike."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsekit import cli
from sparsekit.results import board_markdown, leaderboard, show_board
from sparsekit.results.board import around, cells
from sparsekit.results.comparison import check_comparable, read_run

TOKENIZER = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}, "model": {"vocab": {"a": 0, "b": 1}}}


def report(**pruned: Any) -> dict[str, Any]:
    """The report of a run, as far as `compare` looks at it; `pruned` replaces what was measured."""
    measured = {
        "perplexity": {"wikitext2": 40.0, "ptb": 60.0},
        "context": {name: {"length": 512, "windows": 6} for name in ("wikitext2", "ptb")},
        "tasks": {"piqa": {"acc": 0.6, "acc_stderr": 0.02, "n": 100}},
    }
    texts = [{"source": "text", "name": name, "path": f"{name}.raw"} for name in ("wikitext2", "ptb")]
    stages = [("prepare", 5.0, 9), ("wanda", 10.0, 2), ("fista", 20.0, 3), ("evaluate pruned", 70.0, 8)]
    tasks = [{"name": "piqa", "path": "piqa.jsonl", "prompt": "{{q}}"}]
    return {
        "model": {"name": "m", "class": "LlamaForCausalLM"},
        "recipe": {
            "pattern": "2:4",
            "stages": [{"wanda": {}}, {"fista": {}}],
            "evaluate": {"perplexity": texts, "tasks": tasks},
        },
        "hardware": {"cores": 2},
        "stages": [{"name": n, "seconds": s, "peak_memory_bytes": b} for n, s, b in stages],
        "sparsity": {"total": 0.5, "per_linear": {"a": {}}},
        "evaluation": {"pruned": measured | pruned},
        "verified": True,
    }


def run(folder: Path, found: dict[str, Any], tokenizer: dict[str, Any] = TOKENIZER) -> str:
    """A folder with this report, a tokenizer and a model of 1000 bytes."""
    (folder / "model").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(found))
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model" / "model.safetensors").write_bytes(b"x" * (1000 - len(json.dumps(tokenizer))))
    return str(folder)


def perplexities(wikitext2: float, ptb: float) -> dict[str, Any]:
    return {"perplexity": {"wikitext2": wikitext2, "ptb": ptb}}


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """a, b and c, of which b has the best first perplexity and c the best second."""
    dense = {"perplexity": {"wikitext2": 20.0}, "perplexity_stderr": {"wikitext2": 0.5}, "tasks": {}}
    first, second, third = (report(**perplexities(*both)) for both in ((50, 70), (40, 60), (45, 55)))
    second["evaluation"]["dense"] = dense
    second["sparsity"]["total"] = 0.7
    third["speed"] = {"faster": {"prefill": {"8": 1.2, "1": 1.1}, "decode": {"8": 1.4, "1": 1.3, "16": 2.0}}}
    third["structure"] = {"removed": [0.2, 0.1], "parameters": {"dense": 100, "pruned": 72}}
    third["sparsity"]["per_linear"] = {}
    return [run(tmp_path / name, found) for name, found in zip("abc", (first, second, third), strict=True)]


def order(board: dict[str, Any]) -> str:
    return "".join(Path(row["run"]).name for row in board["runs"])


def test_best_first_by_the_first_perplexity(three: list[str]) -> None:
    board = leaderboard(three)
    assert board["by"] == "wikitext2" and order(board) == "bca"
    quality = ["wikitext2", "ptb", "piqa acc"]
    assert board["columns"] == [*quality, "sparsity", "removed", "prefill", "decode", "size", "seconds", "memory"]
    [dense] = board["dense"]
    assert dense["values"] == {"wikitext2": 20.0} and dense["stderr"] == {"wikitext2": 0.5}


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("ptb", "cba"),
        ("sparsity", "bac"),  # more is better; c has none and comes last
        ("decode", "cab"),
        ("size", "abc"),  # all alike: by name
    ],
)
def test_by_a_column(three: list[str], by: str, expected: str) -> None:
    assert order(leaderboard(three, by=by)) == expected


def test_an_unknown_column(three: list[str]) -> None:
    with pytest.raises(ValueError, match="no column `sparsty`, did you mean `sparsity`"):
        leaderboard(three, by="sparsty")


def test_figures_of_a_row(three: list[str]) -> None:
    board = leaderboard(three)
    row = board["runs"][1]
    assert row["values"] == {
        "wikitext2": 45,
        "ptb": 55,
        "piqa acc": 0.6,
        "removed": pytest.approx(0.28),  # of all parameters
        "prefill": 1.1,  # at the smallest batch
        "decode": 1.3,
        "size": 1000,
        "seconds": 30,  # of what prunes, not of what measures or prepares
        "memory": 3,
    }
    assert row["stderr"] == {"piqa acc": 0.02} and row["stages"] == "wanda > fista" and row["verified"]
    assert around("evaluate dense") and around("verify") and not around("capture")


def test_the_table_in_three_forms(three: list[str]) -> None:
    board = leaderboard(three)
    plain, terminal = (Console(file=io.StringIO(), force_terminal=yes, width=60) for yes in (False, True))
    show_board(board, plain)
    text = plain.file.getvalue()  # type: ignore[attr-defined]
    head, dense, best, *_ = text.splitlines()
    assert head.split()[:4] == ["run", "result", "stages", "wikitext2"]
    assert dense.split() == ["dense", "20.00", "±", "0.50"]
    assert best.startswith("b ") and "0.600 ± 0.020" in best and "70.00%" in best and "1.0 kB" in best
    assert "windows x tokens: wikitext2 6 x 512, ptb 6 x 512" in text and "one standard error" in text
    assert len({len(line.split("0.600")[0]) for line in text.splitlines() if "0.600" in line}) == 1  # columns align
    show_board(board, terminal)
    assert "wiki" in terminal.file.getvalue()  # type: ignore[attr-defined]
    table = [line for line in board_markdown(board).splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]] == cells(board)[1:]


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A report in which one thing differs."""
    found: Any = report()
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


PRUNED = ("evaluation", "pruned")
TEXT = ("recipe", "evaluate", "perplexity", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*PRUNED, "context", "ptb", "windows"), 7, "ptb was measured with windows 7, in the other 6"),
        (
            (*PRUNED, "context", "ptb", "length"),
            256,
            "ptb was measured with length 256, in the other 512",
        ),
        ((*TEXT, "path"), "b.raw", "wikitext2 was measured with path 'b.raw', in the other 'wikitext2.raw'"),
        ((*TEXT, "separator"), " ", "wikitext2 was measured with separator ' ', in the other None"),
        ((*PRUNED, "tasks", "piqa", "n"), 50, "piqa acc was measured with documents 50, in the other 100"),
        (("recipe", "evaluate", "tasks", 0, "prompt"), "x", "piqa acc asks something else"),
        (PRUNED, {"perplexity": {"c4": 3.0}, "context": {}}, "was measured on c4, the other on wikitext2, ptb, piqa"),
    ],
)
def test_another_evaluation_is_refused(tmp_path: Path, path: tuple[str, ...], value: Any, said: str) -> None:
    other = changed(path, value)
    if "c4" in str(value):
        other["recipe"]["evaluate"] = {"perplexity": [{"source": "c4"}]}
    paths = [run(tmp_path / "a", report()), run(tmp_path / "b", other)]
    with pytest.raises(ValueError, match=r"b cannot be compared with .*a: ") as refused:
        leaderboard(paths)
    assert said in str(refused.value)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = TOKENIZER | {"model": {"vocab": {"a": 1, "b": 0}}}
    paths = [run(tmp_path / "a", report()), run(tmp_path / "b", report(), other)]
    with pytest.raises(ValueError, match="their tokenizers differ"):
        leaderboard(paths)
    tasks = [report() for _ in range(2)]
    for found in tasks:
        found["evaluation"]["pruned"]["perplexity"] = {}
        found["recipe"]["evaluate"]["perplexity"] = []
    paths = [run(tmp_path / "c", tasks[0]), run(tmp_path / "d", tasks[1], other)]
    assert leaderboard(paths)["by"] == "piqa acc"  # tasks do not depend on how text is cut


def test_the_order_of_a_vocabulary_and_what_is_beside_it_do_not_matter(tmp_path: Path) -> None:
    other = {"version": "1.0", "model": {"vocab": {"b": 1, "a": 0}}} | TOKENIZER
    assert (
        read_run(run(tmp_path / "a", report())).vocabulary == read_run(run(tmp_path / "b", report(), other)).vocabulary
    )


def test_a_digest_of_the_tokens_decides(tmp_path: Path) -> None:
    reports = [changed((*TEXT, "path"), f"{name}.raw") for name in "abc"]
    for found, digest in zip(reports, ("1", "1", "2"), strict=True):
        for context in found["evaluation"]["pruned"]["context"].values():
            context["digest"] = digest
    one, two, three = (run(tmp_path / name, found) for name, found in zip("abc", reports, strict=True))
    assert len(leaderboard([one, two])["runs"]) == 2  # the same tokens from another place
    with pytest.raises(ValueError, match="the text called ptb gives other tokens"):
        check_comparable([read_run(one), read_run(three)])


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    good = run(tmp_path / "good", report())
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{}")
    bare = report()
    bare["evaluation"] = {}
    cases = {
        str(tmp_path / "half"): "half is not finished: continue it with --resume",
        str(tmp_path / "none"): "none is no run: it has no report.json",
        run(tmp_path / "bare", bare): "bare was not measured: its recipe has no `evaluate`",
        f"{good}/../good": "is given twice",
    }
    for path, said in cases.items():
        with pytest.raises(ValueError, match=said):
            leaderboard([good, path])


def test_what_to_be_careful_with_is_said(tmp_path: Path) -> None:
    failed = changed(("hardware",), {"cores": 64})
    failed["verified"] = ["layer 3 is not 2:4"]
    board = leaderboard([run(tmp_path / "a", report()), run(tmp_path / "b", failed)])
    assert [note.split(":")[0] for note in board["notes"]] == ["seconds and memory", str(tmp_path / "b")]
    assert [line[0] for line in cells(board) if "NOT" in line[0]] == ["b (NOT as asked)"]


def test_command(three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "board.json"
    assert cli.main(["compare", *three, "--by", "ptb", "--json", str(file)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:5]] == ["run", "dense", "c", "b", "a"]
    assert json.loads(file.read_text())["by"] == "ptb"
    assert cli.main(["compare", *three, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| run | result | stages |")
    page = tmp_path / "board.html"
    assert cli.main(["--quiet", "compare", *three, "--html", str(page)]) == 0
    assert capsys.readouterr().out == "" and "Runs compared" in page.read_text()
    assert cli.main(["compare", three[0], str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"sparsekit: {tmp_path / 'nowhere'} is no run")
