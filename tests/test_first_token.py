"""The first token: where it stands, when it is used, and who is told."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit.cli import main
from sparsekit.data import Corpus, own_first_token, sample, windows
from sparsekit.measure import first_token
from sparsekit.train.records import IGNORED
from sparsekit.train.rows import training_rows

TINY = Path(__file__).parent / "models" / "tiny-llama"
TEXT = "".join(chr(97 + i % 26) for i in range(400))


class Letters:
    """A tokenizer of single letters, a to z as 1 to 26, that may put 0 before a text."""

    bos_token_id = 0

    def __init__(self, adds: bool = True):
        self.adds = adds

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * (self.adds and add_special_tokens) + [ord(letter) - 96 for letter in text]}


class Alphabet(nn.Module):
    """Knows which letter follows, if it has seen the first token (or if it has not)."""

    def __init__(self, with_first: bool):
        super().__init__()
        self.with_first, self.weight = with_first, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache=False):
        knows = bool((input_ids[0, 0] == 0) == self.with_first)
        following = input_ids % 26 + 1
        return SimpleNamespace(logits=nn.functional.one_hot(following, 30).float() * (9.0 if knows else 1.0))


@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_it_stands_before_every_window_and_is_counted_in_its_length(sampling):
    corpus = Corpus([TEXT, TEXT], sampling=sampling)
    for tokens in (
        sample(corpus, Letters(), samples=9, length=12, seed=0, first=0),
        windows(corpus, Letters(), 12, 5, 0),
    ):
        assert tokens.shape[1] == 12 and bool((tokens[:, 0] == 0).all())
        assert bool((tokens[:, 2:] == tokens[:, 1:-1] % 26 + 1)[:, :10].float().mean() > 0.95)  # text without a gap
    assert windows(corpus, Letters(), 12, 2, 0)[:, 1:].flatten().tolist() == Letters(False)(TEXT)["input_ids"][:22]


def test_published_windows_are_what_they_were():
    corpus = Corpus([TEXT])
    assert windows(corpus, Letters(), 10, 2).flatten().tolist() == Letters()(TEXT)["input_ids"][:20]


@pytest.mark.parametrize(
    ("bos", "adds", "with_first", "used"),
    [
        ("auto", True, True, "window"),
        ("auto", True, False, "published"),
        ("auto", False, True, "published"),  # a tokenizer that adds none was not trained with one
        ("window", False, False, "window"),
        ("published", True, True, "published"),
    ],
)
def test_auto_asks_the_tokenizer_and_then_the_model(bos, adds, with_first, used):
    found = first_token(bos, Letters(adds), lambda: Alphabet(with_first), lambda: TEXT * 8)
    assert found.used == used and (found.token == 0) == (used == "window")
    assert ("loss" in found.why) == (bos == "auto" and adds)
    assert own_first_token(Letters(adds)) == (0 if adds else None)


def test_a_tokenizer_without_one():
    nothing = SimpleNamespace(bos_token_id=None)
    with pytest.raises(ValueError, match="bos is window, and the tokenizer has no first token"):
        first_token("window", nothing, lambda: None, lambda: "")


def test_rows_of_recovery_begin_with_it(models, tmp_path):
    _, tokenizer = sparsekit.load(models / "tiny-llama")
    options = {"length": 32, "rows": 8, "validation": 0.2, "seed": 0}
    found, _ = training_rows({"source": "python-docs"}, tokenizer, **options, first=7)
    plain, _ = training_rows({"source": "python-docs"}, tokenizer, **options)
    assert bool((found.ids[:, 0] == 7).all()) and found.ids.shape == plain.ids.shape
    assert not bool((found.ids[:, 1:] == 7).all(1).any()) and not bool((found.labels == IGNORED).any())
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"instruction": "Say.", "output": "a"}) + "\n")
    file.write_text(file.read_text() * 20)
    records, _ = training_rows({"source": str(file)}, tokenizer, **options | {"length": 128}, first=7)
    assert not bool((records.ids == 7).any(1).all())  # records have what their format says


def test_a_run_says_what_it_used(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model: {TINY}\nbos: window\npattern: 50%\ncalibration: {{source: python-docs, samples: 4, length: 32}}\n"
        "stages: [wanda]\nevaluate: {perplexity: [{source: python-docs, windows: 3}], length: 32, samples: false}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    assert main(["fit", "--recipe", str(file)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bos"] == {"asked": "window", "used": "window", "why": "it was asked"}
    for which in ("dense", "pruned"):
        assert report["evaluation"][which]["context"]["python-docs"]["first_token"] == 0
    assert "3 x 32 tokens, a first token in each" in (tmp_path / "run" / "model" / "README.md").read_text()
    other = ["--set", "bos=published", f"output={tmp_path / 'other'}"]
    assert main(["fit", "--recipe", str(file), *other]) == 0
    assert main(["compare", str(tmp_path / "run"), str(tmp_path / "other")]) == 2  # not the same tokens
    figures = sparsekit.evaluate(*sparsekit.load(TINY), perplexity=[{"source": "python-docs", "windows": 3}], length=32)
    assert figures["python-docs"].value == pytest.approx(
        json.loads((tmp_path / "other" / "report.json").read_text())["evaluation"]["dense"]["perplexity"]["python-docs"]
    )  # auto: the tokenizer adds none
