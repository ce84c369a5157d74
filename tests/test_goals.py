"""`remove` by what is to be reached: a number of parameters, bytes, a speed that is measured."""

import json
from pathlib import Path
from typing import Any

import pytest

import sparsekit
from sparsekit import cli
from sparsekit.contracts import goal
from sparsekit.run import goals
from sparsekit.run.goals import CLOSE, measured

TINY = Path(__file__).parent / "models" / "tiny-llama"
TEXT = {"source": "python-docs", "samples": 4, "length": 32}


def fit(output: Path, remove: Any, stage: str = "wanda-sp", **options: Any) -> sparsekit.run.Result:
    stages = [{stage: {"remove": remove} | options}]
    recipe = {"model": str(TINY), "calibration": TEXT, "stages": stages, "output": str(output)}
    return sparsekit.fit(recipe, quiet=True)


@pytest.mark.parametrize("stage", ["wanda-sp", "flap", "layer-perplexity"])
def test_so_many_parameters_are_left(stage: str, tmp_path: Path) -> None:
    options = {"bias": False} if stage == "flap" else {}  # which would add some
    result = fit(tmp_path / "run", {"parameters": "150K"}, stage, **options)
    left = result.report["structure"]["parameters"]["pruned"]
    unit = 64 * 160 * 3 + 64 * 64 * 3 + 200 if stage == "layer-perplexity" else 64 * 3 * 8
    assert 150_000 - unit <= left <= 150_000 and result.verified


def test_so_many_bytes_are_left(tmp_path: Path) -> None:
    result = fit(tmp_path / "run", {"memory": "600kB"})
    assert 580_000 < 4 * result.report["structure"]["parameters"]["pruned"] <= 600_000


@pytest.mark.parametrize("outside", [0.1, 0.4])
@pytest.mark.parametrize("bent", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("wanted", [1.2, 1.5, 2.0])
def test_a_share_is_found_in_few_measurements(outside: float, bent: float, wanted: float) -> None:
    """Time is what is outside the blocks, and what is left of the blocks to some power."""
    asked = goal({"speedup": wanted})
    assert asked is not None
    if wanted > 0.95 / (outside + (1 - outside) * 0.1**bent):
        pytest.skip("not even a tenth of the blocks is so fast")
    share, tried = measured(asked, lambda share: 1 / (outside + (1 - outside) * (1 - share) ** bent))
    assert abs(1 / (outside + (1 - outside) * (1 - share) ** bent) / wanted - 1) <= CLOSE
    assert len(tried) <= 5


def test_what_cannot_be_so_fast_is_said() -> None:
    asked = goal({"speedup": 3})
    assert asked is not None
    with pytest.raises(ValueError, match=r"without 90% of its blocks' parameters the model is 1\.85 times as fast"):
        measured(asked, lambda share: 1 / (0.49 + 0.51 * (1 - share)))


def test_a_speed_is_measured_beside_the_source_and_kept_for_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[int]]] = []

    def bench(models: list[str], **options: Any) -> dict[str, Any]:
        small, dense = (sparsekit.load(model)[0].num_parameters() for model in models)
        assert models[1] == str(TINY) and options["backend"] == "transformers" and options["prompt"] == 64
        asked.append((small, options["batches"]))
        return {"faster": {"decode": {"2": 1 / (0.3 + 0.7 * small / dense)}}}

    monkeypatch.setattr(goals, "bench", bench)
    result = fit(tmp_path / "run", {"speedup": 1.3, "batch": 2, "prompt": 64}, shape="uniform", compensate=True)
    assert result.verified and all(batches == [2] for _, batches in asked)
    left, dense = (result.report["structure"]["parameters"][key] for key in ("pruned", "dense"))
    assert 1 / (0.3 + 0.7 * left / dense) == pytest.approx(1.3, rel=2 * CLOSE)
    aim = result.report["notes"]["wanda-sp"]["goal"]
    assert aim["asked"]["speedup"] == 1.3 and aim["remove"] == aim["tried"][-1][0] and len(aim["tried"]) <= 4
    count = len(asked)
    fit(tmp_path / "again", {"speedup": 1.3, "batch": 2, "prompt": 64}, shape="uniform")
    assert len(asked) == 2 * count  # another run measures anew


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ({"parameters": "1K"}, "outside the blocks: ask for more than"),
        ({"memory": "6GB"}, "there is nothing to remove"),
        ({"speedup": 1}, "speedup is how many times as fast, above 1"),
        ({"speedup": 2, "parameters": 7}, "must be a share such as"),
        ({"parameters": "many"}, "must be a share such as"),
        ({"speedup": 2, "new": 0}, "whole numbers above 0"),
        ({"speedup": 2, "backend": "onnxruntime"}, "without a cache here, so there is no decode: give `on: prefill`"),
        ({"speedup": 2, "backend": "llamacpp"}, "backend is 'llamacpp'; it can be transformers, compiled"),
    ],
)
def test_mistakes_are_said_by_a_dry_run(
    remove: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    stages = [{"wanda-sp": {"remove": remove}}]
    file.write_text(json.dumps({"model": str(TINY), "calibration": TEXT, "stages": stages}))
    assert cli.main(["fit", "--recipe", str(file), "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
