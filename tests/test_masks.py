"""Objects cut out of images: sets with masks in every form, prompts, and intersection over union."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_run import fit

from sparsekit.data import masked_images
from sparsekit.measure import evaluate
from sparsekit.measure.masks import Overlap, masks_of, prompt_of
from sparsekit.measure.metrics import Subject
from sparsekit.recipe import RecipeError, load_recipe

Image = pytest.importorskip("PIL.Image")
coco = pytest.importorskip("pycocotools.mask")
MODELS = Path(__file__).parent / "models"
TINY = MODELS / "tiny-sam"
sys.path.insert(0, str(MODELS))
from drawings import drawing, write_drawings  # noqa: E402

HELD_OUT = range(900_000, 900_006)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("drawings")
    write_drawings(found, HELD_OUT)
    return found


@pytest.fixture(scope="module")
def sam():
    from sparsekit.model import load_plain

    return load_plain(TINY)


def same(found, expected) -> bool:
    return len(found) == len(expected) and all(any(np.array_equal(a, b) for b in expected) for a in found)


def test_a_folder_of_pairs(folder):
    found = masked_images(str(folder))
    assert len(found) == len(HELD_OUT)
    for index, seed in enumerate(HELD_OUT):
        picture, masks = drawing(seed)
        given, objects = found.objects(index)
        assert np.array_equal(np.asarray(given), picture) and same(objects, list(masks))
    assert len(found.objects(0, most=1)[1]) == 1


def test_one_image_of_labels(tmp_path):
    picture, masks = drawing(1)
    labels = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0).astype(np.uint8)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "masks" / "a.png")
    assert same(masked_images(str(tmp_path)).objects(0)[1], list(masks))
    colours = Image.fromarray(labels, mode="P")
    colours.putpalette([0, 0, 0, *np.random.default_rng(0).integers(1, 255, 3 * 255).tolist()])
    colours.save(tmp_path / "masks" / "a.png")
    assert same(masked_images(str(tmp_path)).objects(0)[1], list(masks))


def test_sa1b_coco_and_columns(tmp_path):
    import datasets

    picture, masks = drawing(2)
    (tmp_path / "sa").mkdir()
    Image.fromarray(picture).save(tmp_path / "sa" / "a.png")
    encoded = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    written = [each | {"counts": each["counts"].decode()} for each in encoded]
    (tmp_path / "sa" / "a.json").write_text(json.dumps({"annotations": [{"segmentation": each} for each in written]}))
    assert same(masked_images(str(tmp_path / "sa")).objects(0)[1], list(masks))

    box = np.zeros((64, 64), bool)
    box[10:20, 5:30] = True
    annotations = [
        {"id": n, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": 9, "bbox": [0, 0, 1, 1], "segmentation": each}
        for n, each in enumerate([*written, [[5, 10, 30, 10, 30, 20, 5, 20]]])
    ]
    annotations.append(annotations[0] | {"id": 99, "iscrowd": 1})
    told = {"images": [{"id": 7, "file_name": "a.png", "height": 64, "width": 64}], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(told | {"categories": [{"id": 1, "name": "shape"}]}))
    found = masked_images(str(tmp_path / "coco.json"), images=str(tmp_path / "sa"))
    assert same(found.objects(0)[1], [*masks, box])  # a crowd is none

    rows = {"image": [picture], "masks": [[mask.astype(np.uint8) * 255 for mask in masks]]}
    kinds = datasets.Features({"image": datasets.Image(), "masks": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "set.parquet")
    assert same(masked_images(str(tmp_path / "set.parquet")).objects(0)[1], list(masks))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "nowhere.json"}, "there is no file"),
        ({"path": "EMPTY"}, "holds no images with masks"),
        ({"path": "COCO"}, "give their folder by `images`"),
    ],
)
def test_what_is_no_set_of_masks(tmp_path, given, said):
    (tmp_path / "coco.json").write_text("{}")
    places = {"EMPTY": str(tmp_path), "COCO": str(tmp_path / "coco.json")}
    with pytest.raises(ValueError, match=said):
        masked_images(**{key: places.get(value, value) for key, value in given.items()})


def test_a_mask_of_another_size(tmp_path):
    for name, size in (("images", 8), ("masks", 9)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((size, 8), 255, np.uint8)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="8 x 9 pixels, and the image 8 x 8"):
        masked_images(str(tmp_path)).objects(0)


def test_prompts_by_brute_force():
    for seed in range(8):
        for mask in drawing(seed)[1]:
            padded = np.pad(mask, 1)
            inside, outside = np.argwhere(padded), np.argwhere(~padded)
            depth = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1)
            column, row = prompt_of(mask, "point")
            chosen = np.flatnonzero((inside == (row + 1, column + 1)).all(1))[0]
            assert np.isclose(depth[chosen], depth.max())
            column, row = prompt_of(mask, "centroid")
            pixels = np.argwhere(mask)
            away = ((pixels - pixels.mean(0)) ** 2).sum(1)
            found = np.array([row, column]) - pixels.mean(0)
            assert mask[int(row), int(column)] and np.isclose(found @ found, away.min())
            left, top, right, bottom = map(int, prompt_of(mask, "box"))
            assert mask[top : bottom + 1, left : right + 1].sum() == mask.sum()
            assert mask[top].any() and mask[bottom].any() and mask[:, left].any() and mask[:, right].any()


@pytest.mark.parametrize("prompt", ["point", "box"])
def test_masks_are_the_librarys(sam, prompt):
    model, processor = sam
    picture, masks = drawing(900_001)
    prompts = [prompt_of(mask, prompt) for mask in masks]
    made, thought = masks_of(model, processor, Image.fromarray(picture), prompts)
    pixels = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    asked = torch.tensor(prompts)[None]
    given = {"input_boxes": asked} if prompt == "box" else {"input_points": asked[:, :, None]}
    with torch.no_grad():
        out = model(pixel_values=pixels, multimask_output=False, **given)
    assert torch.equal(made, out.pred_masks[0] > 0) and torch.allclose(thought, out.iou_scores[0])


def test_overlap_is_intersection_over_union(sam, folder):
    model, processor = sam
    single, best, likeliest = (
        Overlap({"path": str(folder), "answer": each}) for each in ("single", "best", "likeliest")
    )
    scores = []
    for index, seed in enumerate(HELD_OUT):
        picture, _ = drawing(seed)
        masks = single.found.objects(index)[1]
        made, _ = masks_of(model, processor, Image.fromarray(picture), [prompt_of(mask, "point") for mask in masks])
        own = [(a & b).sum() / (a | b).sum() for a, b in zip(made[:, 0].numpy(), masks, strict=True)]
        assert np.allclose(single.of_image(model, processor, index), own)
        scores.append(np.array(own))
    [(name, figure)] = single(Subject(model, processor)).items()
    whole = np.concatenate(scores)
    mean = whole.mean()
    assert name == f"{folder.name} IoU" and np.isclose(figure.value, mean) and figure.count == len(whole)
    sums = [(own - mean).sum() for own in scores]
    assert np.isclose(figure.stderr, np.sqrt(np.square(sums).sum()) / figure.count)
    three = [each(Subject(model, processor)) for each in (best, likeliest)]
    assert next(iter(three[0].values())).value >= next(iter(three[1].values())).value


def test_of_the_held_out_drawings_it_cuts_most_out_rightly(sam, tmp_path):
    write_drawings(tmp_path, range(900_100, 900_140))
    found = evaluate(*sam, {"iou": [{"path": str(tmp_path), "name": "drawings"}]})
    assert found["figures"]["drawings IoU"]["value"] > 0.85


def test_a_run_says_what_the_masks_are_worth(tmp_path, folder):
    recipe = tmp_path / "sam.yaml"
    recipe.write_text(
        f'model: {TINY}\npattern: "80%"\nstages: [magnitude]\noutput: {tmp_path / "run"}\n'
        f"calibration: {{source: images, path: {folder / 'images'}, samples: 4}}\n"
        f"evaluate: {{iou: [{{path: {folder}, name: drawings}}]}}\n"
    )
    done = fit(recipe)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    dense, pruned = (report["evaluation"][which]["figures"]["drawings IoU"] for which in ("dense", "pruned"))
    assert report["verified"] is True and pruned["value"] < dense["value"] and dense["of"] == "masks"
    assert transformers.SamModel.from_pretrained(tmp_path / "run" / "model")
    assert len(report["samples"]) == 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 12 and "<script" not in page
    for sample in report["samples"]:
        images = [
            Image.open(io.BytesIO(base64.b64decode(sample[who].partition(",")[2]))) for who in ("asked", "pruned")
        ]
        assert {image.size for image in images} == {(240, 240)}


def test_a_model_that_cuts_nothing_out(tmp_path, folder):
    recipe = tmp_path / "vit.yaml"
    recipe.write_text(
        f"model: {MODELS / 'tiny-vit'}\npattern: 50%\nstages: [magnitude]\noutput: {tmp_path / 'run'}\n"
        f"calibration: {{source: images, path: {folder / 'images'}, samples: 4}}\nevaluate: {{iou: [{folder}]}}\n"
    )
    done = fit(recipe)
    assert done.returncode == 2 and "cuts no objects out" in done.stderr
    with pytest.raises(RecipeError, match=r'iou\.0\.prompt` is "dot", valid: box, centroid, point'):
        load_recipe(recipe, ["evaluate.iou.0.prompt=dot"])


def test_eval_measures_any_such_model(folder, capsys):
    from sparsekit.cli import main

    assert main(["eval", str(TINY), "--iou", str(folder)]) == 0
    assert f"{folder.name} IoU" in capsys.readouterr().out
    assert main(["eval", str(MODELS / "tiny-vit"), "--iou", str(folder)]) == 2
    assert "cuts no objects out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"prompt": "dot"}, "`prompt` is 'dot', valid: box, centroid, point"),
        ({"answer": "first"}, "`answer` is 'first', valid: best, likeliest, single"),
        ({"promt": "box"}, "unknown key `promt`, did you mean `prompt`"),
    ],
)
def test_what_an_entry_cannot_say(folder, entry, said):
    with pytest.raises(ValueError, match=said):
        Overlap({"path": str(folder), **entry})


def test_a_set_that_cannot_be_read_is_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "images").mkdir()
    told = {"images": [{"id": 7, "file_name": "gone.png", "height": 4, "width": 4}], "categories": []}
    told["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 2, 0, 2, 2]]}
    ]
    (tmp_path / "coco.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="its first image cannot be read"):
        Overlap({"path": str(tmp_path / "coco.json"), "images": str(tmp_path / "images")})
