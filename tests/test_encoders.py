"""Encoders and embedders are measured: embeddings, masked tokens, images by the names of their classes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import sparsekit
from sparsekit.data import corpus, windows
from sparsekit.measure import Subject
from sparsekit.measure.embeddings import embeddings, sentences
from sparsekit.measure.masked_loss import masked_loss
from sparsekit.measure.metrics import Preparation
from sparsekit.measure.zero_shot import zero_shot
from tests.matrix.towers import PROCESSOR, pictures, save

Image = pytest.importorskip("PIL.Image")


class Words:
    """A tokenizer: a number for each letter, between two special tokens."""

    cls_token_id, sep_token_id, mask_token_id = 1, 2, 3
    all_special_ids = (0, 1, 2, 3)

    def __call__(self, text: str, truncation=False, max_length=None, **_: object) -> dict[str, list[int]]:
        ids = [1, *(4 + ord(letter) % 60 for letter in text), 2]
        return {"input_ids": ids[:max_length] if truncation else ids}


def bert(seed: int, kind: str = "BertForMaskedLM"):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=64, initializer_range=0.3, **small)
    return getattr(transformers, kind)(config).eval()


def test_the_masked_loss_is_transformers_own() -> None:
    """The same windows, the same places, by the loss that the model itself computes."""
    model = bert(0)
    [figure] = masked_loss(Preparation(Words(), model.config), windows=6, length=40)(Subject(model, Words())).values()
    rows = windows(corpus({"source": "python-docs"}, "test", ()), Words(), 38, 6)
    rows = torch.cat([torch.full((6, 1), 1), rows, torch.full((6, 1), 2)], 1)
    hidden = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.15
    hidden &= rows > 3
    assert hidden.any(1).all()
    with torch.no_grad():
        own = [
            float(model(input_ids=row.masked_fill(place, 3)[None], labels=row.masked_fill(~place, -100)[None]).loss)
            for row, place in zip(rows, hidden, strict=True)
        ]
    assert figure.value == pytest.approx(sum(own) / 6, rel=1e-5)
    assert figure.better == "lower" and figure.count == 6


@pytest.mark.parametrize("pooling", ["auto", "mean", "first", "last"])
def test_embeddings(pooling: str) -> None:
    """Cosines of pooled hidden states, a text at a time; 1 of the model itself."""
    dense, other = bert(0, "BertModel"), bert(1, "BertModel")
    measure = embeddings(Preparation(Words(), dense.config, dense=lambda: dense), texts=5, length=30, pooling=pooling)
    [same] = measure(Subject(dense, Words())).values()
    [apart] = measure(Subject(other, Words())).values()
    near = []
    for text in sentences("python-docs", 5):
        ids = torch.tensor([Words()(text)["input_ids"][:30]])
        with torch.no_grad():
            pair = [model(input_ids=ids).last_hidden_state[0] for model in (dense, other)]
        pooled = [{"first": each[0], "last": each[-1]}.get(pooling, each.mean(0)) for each in pair]
        near.append(float(torch.cosine_similarity(*pooled, dim=0)))
    assert same.value == pytest.approx(1) and apart.value == pytest.approx(sum(near) / 5, abs=1e-5)


def test_paragraphs_and_not_whole_documents() -> None:
    """A source of few long documents still has enough texts."""
    found = sentences("python-docs", 200)
    assert len(found) == 200 == len(set(found)) and not any("\n\n" in text for text in found)


def test_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    """What it puts behind a model is in the result, and its pooling is what is measured."""
    save("masked", "bert", tmp_path / "source")
    (tmp_path / "source" / "1_Pooling").mkdir()
    (tmp_path / "source" / "2_Dense").mkdir()
    (tmp_path / "source" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (tmp_path / "source" / "2_Dense" / "model.safetensors").write_bytes(b"weights of another module")
    parts = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../outside"}]
    (tmp_path / "source" / "modules.json").write_text(json.dumps(parts))
    recipe = {
        "model": str(tmp_path / "source"),
        "pattern": "2:4",
        "calibration": {"source": "python-docs", "samples": 4, "length": 16},
        "stages": ["wanda"],
        "evaluate": {"metrics": [{"embeddings": {"texts": 8, "length": 16}}]},
        "output": str(tmp_path / "run"),
    }
    result = sparsekit.fit(recipe, quiet=True)
    assert result.verified
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "run" / "model" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    [figure] = result.report["evaluation"]["pruned"]["figures"].values()
    assert figure["settings"]["pooling"] == "first" and figure["value"] < 1


def test_zero_shot_is_the_models_own_answer(tmp_path: Path) -> None:
    """The likeliest class by CLIP's own forward pass of all images and all names."""
    save("backbones", "clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    folder = pictures(tmp_path / "pictures")
    (folder / "0").rename(folder / "a_cat")
    (folder / "1").rename(folder / "a_dog")
    model, tokenizer = sparsekit.load(tmp_path / "clip")
    [figure] = zero_shot(Preparation(tokenizer, model.config), path=str(folder))(Subject(model, tokenizer, 3)).values()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "clip")
    files = sorted(folder.rglob("*.png"))
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    wide = model.config.text_config.max_position_embeddings
    said = tokenizer(
        ["a photo of a a cat.", "a photo of a a dog."], padding="max_length", max_length=wide, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(
            pixel_values=pixels, input_ids=said.input_ids, attention_mask=said.attention_mask
        ).logits_per_image
    right = [
        ("a_cat", "a_dog")[int(best)] == file.parent.name for best, file in zip(logits.argmax(1), files, strict=True)
    ]
    assert figure.value == pytest.approx(sum(right) / len(right)) and figure.count == 8


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        (masked_loss, {"source": "nowhere.txt"}, "nowhere.txt"),
        (embeddings, {}, "which that is was not said"),
        (zero_shot, {"path": ".", "template": "a photo"}, "must have {} where"),
    ],
)
def test_mistakes(metric, options: dict[str, object], said: str) -> None:
    """Before a model is measured."""
    with pytest.raises(ValueError, match=said):
        metric(Preparation(Words(), bert(0).config), **options)


def test_a_model_that_does_not_fit() -> None:
    """One sentence, and not a traceback of the model's."""
    model = bert(0, "BertModel")
    with pytest.raises(ValueError, match="predicts no tokens"):
        masked_loss(Preparation(Words(), model.config), windows=2, length=16)(Subject(model, Words()))


def test_a_pooling_that_is_not_known(tmp_path: Path) -> None:
    """It is not taken for the mean."""
    from sparsekit.measure.embeddings import _pooling

    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    for told, how in (
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
    ):
        file.write_text(json.dumps(told))
        assert _pooling(tmp_path, bert(0)) == how
    several = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}  # one behind the other
    for told in ({"pooling_mode": "weightedmean"}, several):
        file.write_text(json.dumps(told))
        with pytest.raises(ValueError, match="pools in a way that is not known here"):
            _pooling(tmp_path, bert(0))
