"""Vision models: found and walked like language models, pruned from images, measured by accuracy."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from test_run import fit

from sparsekit.data import images
from sparsekit.measure.images import accuracy as image_accuracy
from sparsekit.measure.images import labelled_images
from sparsekit.model import Checkpoint, discover, opened
from sparsekit.recipe import Recipe
from sparsekit.results import verify
from sparsekit.run.allocation import sample_input
from sparsekit.walk import BlockStream

TINY = Path(__file__).parent / "models" / "tiny-vit"
Image = pytest.importorskip("PIL.Image")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}
FAMILIES = {
    "vit": SMALL,
    "deit": SMALL | {"architectures": ["DeiTForImageClassification"]},
    "dinov2": SMALL,
    "beit": SMALL,
    "data2vec-vision": SMALL,
    "clip": {"vision_config": SMALL, "text_config": {"bos_token_id": 1, "eos_token_id": 2}},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The handwritten digits that scikit-learn carries, as files: every fourth is for testing."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    folder = tmp_path_factory.mktemp("digits")
    for index, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        file = folder / ("test" if index % 4 == 3 else "train") / str(label) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels / 16 * 255).round().astype("uint8")).save(file)
    return folder


def recipe_of(folder: Path, digits: Path, name: str, pattern: str, stages: str, more: str = "") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        f'model: {TINY}\npattern: "{pattern}"\nstages: {stages}\n'
        f"calibration: {{source: images, path: {digits}, samples: 64, batch: 8}}\n"
        f"evaluate: {{accuracy: [{{path: {digits}, name: digits}}], batch: 64}}\noutput: {folder / name}\n{more}"
    )
    return file


def run(folder: Path, digits: Path, name: str, pattern: str, stages: str) -> dict:
    done = fit(recipe_of(folder, digits, name, pattern, stages))
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / name / "report.json").read_text())
    assert report["verified"] is True
    return report


def accuracy(report: dict, which: str = "pruned") -> float:
    return report["evaluation"][which]["tasks"]["digits"]["acc"]


@pytest.mark.long
def test_a_better_method_keeps_more_accuracy(tmp_path, digits):
    pattern = "80%"
    found = {
        name: run(tmp_path, digits, name, pattern, stages)
        for name, stages in {"magnitude": "[magnitude]", "sparsegpt": "[sparsegpt]", "lamp": "[lamp]"}.items()
    }
    dense = accuracy(found["lamp"], "dense")
    assert dense > 0.97
    assert accuracy(found["magnitude"]) < accuracy(found["sparsegpt"]) < accuracy(found["lamp"]) <= dense


def test_what_is_on_disk_is_a_model_like_any_other(tmp_path, digits):
    report = run(tmp_path, digits, "run", "2:4", "[{lamp: {epochs: 2, quantize: {bits: 4, group: 48}}}]")
    folder = tmp_path / "run" / "model"
    assert "why_not" in report["exports"]["packed"]  # its names on disk are not the model's
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    stored = opened(folder)
    for name, entry in report["sparsity"]["per_linear"].items():
        weight = stored[f"{name}.weight"]
        assert (weight.reshape(-1, 4) == 0).sum(1).ge(2).all() and entry["pattern"] == "2:4"
        assert torch.equal(weight, model.get_parameter(f"{name}.weight"))
    card = (folder / "README.md").read_text()
    assert "AutoImageProcessor" in card and "digits acc" in card
    assert set(Checkpoint(folder)) == set(Checkpoint(TINY))  # stored as its family stores it
    assert (tmp_path / "run" / "report.html").is_file()


def test_verify_sees_what_was_changed_behind_its_back(tmp_path, digits):
    from safetensors.torch import load_file, save_file

    run(tmp_path, digits, "run", "2:4", "[wanda]")
    folder = tmp_path / "run" / "model"
    assert not verify(folder, "2:4", TINY).failures
    file = folder / "model.safetensors"
    for key, said in (("classifier.bias", "differs"), ("query.weight", "is not 2:4")):
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(key))
        save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
        assert any(said in failure for failure in verify(folder, "2:4", TINY).failures)
        save_file(tensors, file, {"format": "pt"})
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    assert any("is missing" in failure for failure in verify(folder, "2:4").failures)


@pytest.mark.long
def test_resuming_gives_the_same_bits(tmp_path, digits):
    from safetensors.torch import load_file

    whole = recipe_of(tmp_path, digits, "whole", "70%", "[lamp]", "keep: true\n")
    assert fit(whole).returncode == 0
    half = recipe_of(tmp_path, digits, "half", "70%", "[lamp]", "keep: true\n")
    assert fit(half).returncode == 0
    folder = tmp_path / "half"
    (folder / "report.json").unlink()
    for block in (2, 3):
        (folder / "blocks" / f"{block:05d}.safetensors").unlink()
    assert fit(half, "--resume").returncode == 0
    one, two = (load_file(each / "model" / "model.safetensors") for each in (tmp_path / "whole", folder))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_are_the_model(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    blocks = discover(model, sample_input(model))
    assert len(blocks) == 2 and sorted(map(len, blocks[0].groups)) == [1, 1, 1, 3]  # o, up, down, and q k v
    pixels, outputs = torch.randn(2, 3, 32, 32), []
    handle = blocks[-1].module.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        model(pixel_values=pixels)
    handle.remove()
    stream = BlockStream.over(model, blocks, pixels, batch=2)
    stream.advance(blocks[0])
    whole = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.equal(blocks[-1](stream.inputs[0]), whole)


def test_sam_is_pruned_in_its_image_encoder(tmp_path, digits):
    """Hidden states (images, height, width, channels), windows that pad, fused q, k and v."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    torch.manual_seed(0)
    encoder = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 64, "window_size": 3}
    encoder |= {"image_size": 64, "patch_size": 16, "output_channels": 16, "num_pos_feats": 8}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "iou_head_hidden_dim": 16, "num_attention_heads": 2}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    config = transformers.SamConfig(
        vision_config=encoder | {"global_attn_indexes": [1]},
        mask_decoder_config=decoder,
        prompt_encoder_config=prompts,
    )
    dense = transformers.SamModel(config).eval()
    dense.save_pretrained(tmp_path / "sam")
    size = {"longest_edge": 64}, {"height": 64, "width": 64}
    SamImageProcessorPil(size=size[0], pad_size=size[1]).save_pretrained(tmp_path / "sam")
    file = recipe_of(tmp_path, digits, "run", "2:4", "[lamp]")
    done = fit(file, "--set", f"model={tmp_path / 'sam'}", "evaluate={}", "calibration.batch=2")
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForMaskGeneration.from_pretrained(tmp_path / "run" / "model")
    weight = model.vision_encoder.layers[2].attn.qkv.weight
    assert (weight.detach().reshape(-1, 4) == 0).sum(1).eq(2).all()
    assert torch.equal(model.mask_decoder.iou_token.weight, dense.mask_decoder.iou_token.weight)
    done = fit(file, "--set", f"model={tmp_path / 'sam'}", f"output={tmp_path / 'other'}")
    assert done.returncode == 2 and "SamModel tells no classes" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stages=[{layer-perplexity: {remove: 30%}}]", "pattern=null"], "is for causal language models, and ViTFor"),
        (["evaluate={perplexity: [python-docs]}"], "evaluate.perplexity is for causal language models"),
        (["calibration={source: python-docs, samples: 4}"], "source `python-docs` gives text"),
        (["calibration.samples=100000"], "1348 images, fewer than `samples`, 100000"),
        (["calibration.path=nowhere"], "`nowhere` is no folder, file or hub data set of images"),
        (["calibration.part=trains"], "has no part `trains`"),
        (["calibration.image=pixels"], "has no images called `pixels`: set `image` to one of image"),
        (["evaluate.accuracy.0.label=kind"], "no labels called `kind`"),
    ],
)
def test_mistakes(settings, said, tmp_path, digits):
    done = fit(recipe_of(tmp_path, digits, "run", "2:4", "[wanda]"), "--set", *settings)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "run" / "blocks").exists()


def test_images_are_for_vision_models_alone(tmp_path, digits):
    file = recipe_of(tmp_path, digits, "run", "2:4", "[wanda]")
    llama = f"model={TINY.parent / 'tiny-llama'}"
    done = fit(file, "--set", llama, "evaluate={}", "calibration.length=64")
    assert done.returncode == 2 and "`images` gives images, and text is asked for" in " ".join(done.stderr.split())
    done = fit(file, "--set", llama, "calibration={source: python-docs, samples: 4, length: 64}")
    assert done.returncode == 2 and "evaluate.accuracy has nothing to measure" in " ".join(done.stderr.split())


def test_other_commands_on_a_vision_model(tmp_path, digits, capsys):
    from sparsekit.cli import main

    run(tmp_path, digits, "run", "2:4", "[wanda]")
    folder = str(tmp_path / "run")
    assert main(["eval", folder, "--accuracy", str(digits)]) == 0
    assert f"{digits.name} acc" in capsys.readouterr().out
    assert main(["verify", folder, "--pattern", "2:4", "--against", str(TINY)]) == 0
    for command, said in (
        (["eval", folder, "--perplexity", "python-docs"], "perplexity and tasks are of text"),
        (["eval", str(TINY.parent / "tiny-llama"), "--accuracy", str(digits)], "tells no classes"),
        (["bench", folder, "--backend", "llama.cpp", "--batch", "1"], "is for language models here"),
    ):
        assert main(command) == 2 and said in " ".join(capsys.readouterr().err.split())


def test_classes_go_by_name_or_else_by_order(digits):
    found = labelled_images(str(digits))
    model = transformers.AutoModelForImageClassification.from_pretrained(TINY)
    config = model.config
    assert found.classes(model) == list(range(10))
    config.label2id = {str(9 - number): number for number in range(10)}
    assert found.classes(model) == list(range(9, -1, -1))
    config.id2label, config.label2id = {0: "zero"}, {f"class {number}": number for number in range(10)}
    with pytest.warns(UserWarning, match="taken in order"):
        assert found.classes(model) == list(range(10))
    config.label2id = {"cat": 0, "dog": 1}
    with pytest.raises(ValueError, match="10 classes, the model 2"):
        found.classes(model)


def test_images_in_a_parquet_file(tmp_path, digits):
    """As data sets on the hub are stored; labels are numbers, and -1 where there is none."""
    import datasets

    model = transformers.AutoModelForImageClassification.from_pretrained(TINY).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(TINY)
    rows = images("test", path=str(digits)).rows.select(range(0, 449, 15))
    rows = rows.rename_column("image", "picture").cast_column("label", datasets.Value("int64"))
    rows.to_parquet(tmp_path / "digits.parquet")
    entry = {"path": str(tmp_path / "digits.parquet"), "image": "picture"}
    assert image_accuracy(model, processor, labelled_images(entry))["acc"] > 0.9
    rows.map(lambda row: {"label": -1}).to_parquet(tmp_path / "digits.parquet")
    with pytest.raises(ValueError, match="label -1, which is no class"):
        image_accuracy(model, processor, labelled_images(entry))


def test_other_labels_are_another_accuracy(digits):
    model = transformers.AutoModelForImageClassification.from_pretrained(TINY).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(TINY)
    found = labelled_images({"path": str(digits), "part": "test"})
    assert len(found) == 449
    seen = image_accuracy(model, processor, found, batch=32, limit=100)
    assert seen["images"] == 100 and seen["acc"] > 0.9
    model.config.label2id = {str((number + 1) % 10): number for number in range(10)}
    assert image_accuracy(model, processor, found, batch=32, limit=100)["acc"] < 0.1


def test_two_sets_of_one_name_do_not_hide_each_other(tmp_path, digits, capsys):
    from sparsekit.cli import main

    done = fit(recipe_of(tmp_path, digits, "run", "2:4", "[wanda]"), "--set", "evaluate={accuracy: [a/val, b/val]}")
    assert done.returncode == 2 and "several sets of images are called `val`" in " ".join(done.stderr.split())
    assert main(["eval", str(TINY), "--accuracy", "a/val", "b/val"]) == 2
    assert "two sets of images are called `val`" in capsys.readouterr().err


def test_a_path_alone_is_a_set_of_images():
    assert (
        Recipe.model_validate(
            {"model": "m", "stages": ["wanda"], "pattern": "2:4", "evaluate": {"accuracy": ["photos/val"]}}
        )
        .evaluate.accuracy[0]
        .called
        == "val"
    )
