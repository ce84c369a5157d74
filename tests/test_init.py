"""`sparsekit init`: five answers, a recipe that is right."""

from itertools import product
from pathlib import Path

import pytest

from sparsekit import cli
from sparsekit.recipe import QUESTIONS, asked, check_options, first_recipe, load_recipe

TINY = Path(__file__).parent / "models" / "tiny-llama"


@pytest.mark.parametrize(("goal", "time"), product(QUESTIONS["goal"].choices, QUESTIONS["time"].choices))
def test_every_answer_gives_a_recipe_without_a_problem(goal: str, time: str, tmp_path: Path) -> None:
    answers = {"model": str(TINY), "goal": goal, "time": time, "text": "python-docs", "output": "runs/x"}
    file = tmp_path / "r.yaml"
    file.write_text(first_recipe(answers))
    recipe = load_recipe(file)
    assert check_options(recipe) == []
    assert recipe.output == "runs/x" and recipe.calibration.source == "python-docs"
    assert recipe.pattern == {"faster": None, "2:4": "2:4", "50%": "50%", "int4": "2:4"}[goal]


def test_what_is_not_given_is_asked_until_it_is_an_answer() -> None:
    said = iter(["", "fast", "2:4", "hours", "notes.txt", ""])
    questions: list[str] = []
    found = asked({}, lambda question: questions.append(question) or next(said))  # type: ignore[func-returns-value]
    assert found["model"] == QUESTIONS["model"].default and found["goal"] == "2:4" and found["text"] == "notes.txt"
    assert len(questions) == 6 and questions[1] == questions[2]


def test_the_recipe_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "mine.yaml", tmp_path / "run"
    command = ["init", str(file), "--model", str(TINY), "--goal", "2:4", "--time", "minutes", "--text", "python-docs"]
    assert cli.main([*command, "--output", str(output)]) == 0
    assert "--dry-run" in capsys.readouterr().out
    small = ["calibration.samples=4", "calibration.length=64", "evaluate.length=64", "evaluate.perplexity=[]"]
    assert cli.main(["fit", "--recipe", str(file), "--set", *small]) == 0
    assert cli.main([*command, "--output", str(output)]) == 2  # it is not written over
    assert "there is a" in capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "r.yaml")
    assert cli.main(["init", file, "--model", "m", "--goal", "fastr"]) == 2
    assert "did you mean `faster`" in capsys.readouterr().err

    def nobody(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert cli.main(["init", file]) == 2
    assert "there is nobody to answer" in capsys.readouterr().err
