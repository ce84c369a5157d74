"""One part of a model is pruned: the vision tower of a model of text and images, a tower of CLIP, an encoder."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsekit
from sparsekit.cli import main
from sparsekit.data import images
from sparsekit.model import (
    choose_tower,
    chosen_tower,
    discover,
    features,
    find_blocks,
    image_processor,
    run_model,
    skeleton,
)
from tests.matrix.towers import PROCESSOR, pictures, save

KINDS = {"llava": "image-text", "gemma3": "image-text", "idefics3": "image-text", "mistral3": "image-text"}
KINDS |= {"clip": "backbones", "siglip": "backbones", "t5": "two"}
PATCHES = ("qwen2_5_vl", "gemma4", "lfm2_vl")  # towers that are given patches, and where each lies in three ways
KINDS |= dict.fromkeys(PATCHES, "towers")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models of several parts."""
    folder = tmp_path_factory.mktemp("towers")
    for name, task in KINDS.items():
        save(task, name, folder / name)
        if task not in ("two", "towers"):
            (folder / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    pictures(folder / "pictures")
    return {each.name: each for each in folder.iterdir()}


def recipe(places: dict[str, Path], name: str, output: Path, **more: object) -> dict[str, object]:
    """Images for a vision tower, text for all else."""
    images = {"source": "images", "path": str(places["pictures"]), "samples": 6, "side": 32}
    seen = more.get("prune") == "vision"
    return {
        "model": str(places[name]),
        "pattern": "2:4",
        "calibration": images if seen else {"source": "python-docs", "samples": 4, "length": 16},
        "stages": ["sparsegpt"],
        "evaluate": {"features": [{"path": str(places["pictures"]), "side": 32}]} if seen else {},
        "output": str(output),
        **more,
    }


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("gemma3", "mistral3", "siglip", "gemma4", "lfm2_vl")]


@pytest.mark.parametrize("name", ["llava", "idefics3", "clip", "qwen2_5_vl", *LONG])
def test_a_vision_tower(places: dict[str, Path], name: str, tmp_path: Path) -> None:
    """It is pruned whole, all else is the source's bit for bit, and plain transformers loads the result."""
    result = sparsekit.fit(recipe(places, name, tmp_path / "run", prune="vision"), quiet=True)
    assert result.verified
    before, after = (load_file(place / "model.safetensors") for place in (places[name], tmp_path / "run" / "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys() and changed and all(re.search("vision|visual", name) for name in changed)
    pruned = result.report["sparsity"]["per_linear"]
    assert len(pruned) >= 12 and result.report["sparsity"]["total"] == 0.5
    cosine = result.report["evaluation"]["pruned"]["figures"]["pictures cosine"]["value"]
    assert cosine < 1 and result.report["evaluation"]["dense"]["figures"]["pictures cosine"]["value"] > 0.9999
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("name", [*PATCHES, pytest.param("lfm2_vl", id="padded")])
def test_patches_are_what_the_processor_makes(
    places: dict[str, Path], name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A tower gives for two pictures what it gives by the family's own call with what its processor says of them."""
    from PIL import Image

    model, processor = sparsekit.load(places[name])[0], image_processor(places[name])
    found = images("test", path=str(places["pictures"]), side=32)
    squares = [found.rows[index]["image"].resize((32, 32), Image.Resampling.BICUBIC) for index in (0, 5)]
    choose_tower(model, "vision")
    tower = chosen_tower(model)
    if request.node.callspec.id == "padded":
        processor.max_num_patches = 20  # of which 16 are a picture's
    made = processor(images=squares, return_tensors="pt")
    beside = {"grid_thw": "image_grid_thw", "pixel_position_ids": "image_position_ids"}
    names = [each for each in inspect.signature(tower.forward).parameters if each != "kwargs"]
    given = {each: made["pixel_values" if each == "hidden_states" else beside.get(each, each)] for each in names}
    with torch.no_grad():
        own = tower(**given).last_hidden_state
        patches = found.pixels([0, 5], processor, 3)
        places_seen = features(model, patches)[1]
    if request.node.callspec.id == "padded":
        own = own[:, :16]
    assert patches.shape[:2] == (2, 144 if name == "gemma4" else 16) or name == "gemma4"
    torch.testing.assert_close(places_seen, own.reshape(places_seen.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [pytest.param("lamp", marks=pytest.mark.long), "lora"])
def test_what_trains_a_vision_tower(places: dict[str, Path], stage: str, tmp_path: Path) -> None:
    """Blocks are trained, and the tower by the dense tower's features."""
    options = {"lamp": {"epochs": 1}, "lora": {"steps": 2, "batch": 1}}[stage]
    stages = [{stage: options}] if stage == "lamp" else ["wanda", {stage: options}]
    result = sparsekit.fit(recipe(places, "llava", tmp_path / "run", prune="vision", stages=stages), quiet=True)
    assert result.verified and result.report["sparsity"]["total"] == 0.5


@pytest.mark.parametrize(
    ("name", "part", "inside"),
    [("clip", "text", "text_model."), ("llava", "text", "language_model."), ("t5", "decoder", "decoder.")],
)
def test_another_part(places: dict[str, Path], name: str, part: str, inside: str, tmp_path: Path) -> None:
    """What is named is pruned, and nothing else."""
    result = sparsekit.fit(recipe(places, name, tmp_path / "run", prune=part), quiet=True)
    assert result.verified
    pruned = result.report["sparsity"]["per_linear"]
    assert pruned and all(inside in linear for linear in pruned)


def test_both_towers_one_after_the_other(places: dict[str, Path], tmp_path: Path) -> None:
    """The second recipe begins with what the first left, whose zeros stay."""
    sparsekit.fit(recipe(places, "clip", tmp_path / "one", prune="vision"), quiet=True)
    given = recipe(places, "clip", tmp_path / "two", prune="text") | {"model": str(tmp_path / "one" / "model")}
    assert sparsekit.fit(given, quiet=True).verified
    model = load_file(tmp_path / "two" / "model" / "model.safetensors")
    halves = [
        name for name, tensor in model.items() if tensor.dim() == 2 and 2 * int((tensor == 0).sum()) == tensor.numel()
    ]
    assert any("vision_model" in name for name in halves) and any("text_model" in name for name in halves)


def test_the_tower_alone_runs(places: dict[str, Path]) -> None:
    """Its blocks have the names that they have in the model, and everything else is passed over."""
    model = skeleton(places["llava"])
    everything = [block.name for block in find_blocks(model)]
    choose_tower(model, "vision")
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    run_model(model, torch.zeros(1, 3, 32, 32, device="meta"))
    blocks = discover(model, torch.zeros(1, 3, 32, 32, device="meta"))
    assert all("language_model" in name for name in everything)
    assert blocks and all(block.name.startswith("model.vision_tower.") for block in blocks)
    assert seen and not any("language_model" in name for name in seen)


def test_a_model_in_memory(places: dict[str, Path]) -> None:
    """Pixels in place of a folder, and the model is as it was afterwards but for the weights."""
    model, tokenizer = sparsekit.load(places["llava"])
    result = sparsekit.prune(
        model, tokenizer, pattern="2:4", stages=["wanda"], calibration=torch.randn(2, 3, 32, 32), prune="vision"
    )
    assert result.verified and all("vision_tower" in name for name in result.masks)
    assert all("language_model" in block.name for block in find_blocks(result.model))


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("clip", {}, "give `prune: text` or vision"),
        ("llava", {"prune": "all"}, "a run prunes one of them"),
        ("llava", {"prune": "encoder"}, "LlavaForConditionalGeneration has text, vision: give one of them"),
        ("t5", {"prune": "vision"}, "has encoder, decoder, all"),
        ("llava", {"prune": "tower"}, "valid: all, decoder, encoder, text, vision"),
        (
            "llava",
            {"prune": "vision", "stages": [{"wanda-sp": {"remove": 0.3}}], "pattern": None},
            "changes the model's shape",
        ),
        ("llava", {"prune": "vision", "evaluate": {"perplexity": ["python-docs"]}}, "sees images"),
        ("llava", {"prune": "vision", "calibration": {"source": "python-docs"}}, "gives text"),
    ],
)
def test_mistakes(places: dict[str, Path], name: str, more: dict[str, object], said: str, tmp_path: Path) -> None:
    """One sentence, before anything is read."""
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        sparsekit.fit(recipe(places, name, tmp_path / "run", **more), quiet=True)


def test_patches_of_another_model(places: dict[str, Path], tmp_path: Path) -> None:
    """An image processor that makes other patches than the tower takes is told at once."""
    shutil.copytree(places["qwen2_5_vl"], tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temporal_patch_size": 1}))
    given = recipe(places, "qwen2_5_vl", tmp_path / "run", prune="vision") | {"model": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"patches of square images \(images, patches, 384\), and here is"):
        sparsekit.fit(given, quiet=True)


def test_eval_of_a_tower(places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sparsekit eval --features` looks at the vision tower."""
    sparsekit.fit(recipe(places, "llava", tmp_path / "run", prune="vision"), quiet=True)
    told = [
        "eval",
        str(tmp_path / "run" / "model"),
        "--features",
        str(places["pictures"]),
        "--against",
        str(places["llava"]),
    ]
    assert main(told) == 0
    assert "cosine" in capsys.readouterr().out


def test_eval_of_features_without_a_tower(models, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that reads text alone has none."""
    told = [
        "eval",
        str(models / "tiny-llama"),
        "--features",
        str(places["pictures"]),
        "--against",
        str(places["llava"]),
    ]
    assert main(told) == 2
    assert "has no tower that sees images" in capsys.readouterr().err
