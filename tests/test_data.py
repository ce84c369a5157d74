import hashlib
import json
import logging
import random
import subprocess
import sys

import pytest
import torch

from sparsekit import registry
from sparsekit.data import Corpus, calibration_tokens, corpora, resolve, sample, windows
from sparsekit.data.corpora import c4, jsonl, ptb, python_docs, text, wikitext2

BOS = 256


class Bytes:
    """One token a byte, after a BOS."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [BOS, *text.encode()]}


def encode(text):
    return Bytes()(text)["input_ids"]


# Cutting


def test_calibration_from_windows_follows_the_published_loop():
    words = [f"word{i}" for i in range(200)]
    tokens = sample(Corpus(words, " "), Bytes(), samples=16, length=24, seed=3)
    ids = encode(" ".join(words))
    random.seed(3)  # the generator that the published code uses, seeded as it does
    for row in tokens.tolist():
        start = random.randint(0, len(ids) - 24 - 1)
        assert row == ids[start : start + 24]


def test_calibration_from_documents_follows_the_published_loop():
    lengths = random.Random(0)
    documents = [chr(97 + i % 26) * lengths.randint(5, 60) + str(i) for i in range(120)]
    tokens = sample(Corpus(documents, " ", "documents"), Bytes(), samples=40, length=32, seed=1)
    random.seed(1)
    for row in tokens.tolist():
        while True:
            ids = encode(documents[random.randint(0, len(documents) - 1)])
            if len(ids) > 32:
                break
        start = random.randint(0, len(ids) - 32 - 1)
        assert row == ids[start : start + 32]


def test_a_document_of_exactly_the_length_is_not_taken():
    corpus = Corpus(["x" * 9, "y" * 10], sampling="documents")  # 10 and 11 tokens
    with pytest.warns(UserWarning, match="come from only 1 documents"):
        tokens = sample(corpus, Bytes(), samples=6, length=10, seed=0)
    assert (tokens[:, 1:] == ord("y")).all()


def test_calibration_is_a_function_of_the_seed():
    corpus = Corpus([str(i) for i in range(500)])
    first, again, other = (sample(corpus, Bytes(), samples=8, length=16, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 16)
    assert first.dtype == torch.int64


def test_test_windows_are_tokenised_once_and_do_not_overlap():
    tokens = windows(Corpus(["abc", "defg", "hi"], "\n\n"), Bytes(), 4)
    ids = [BOS, *b"abc\n\ndefg\n\nhi"]  # 14 tokens: 3 windows, 2 tokens dropped
    assert tokens.tolist() == [ids[0:4], ids[4:8], ids[8:12]]


@pytest.mark.parametrize(
    ("own", "given", "count"), [(None, None, 25), (7, None, 7), (None, 5, 5), (7, 9, 7), (99, 99, 25)]
)
def test_the_smaller_limit_holds(own, given, count):
    assert len(windows(Corpus(["x" * 99], limit=own), Bytes(), 4, given)) == count


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (Corpus(["x" * 9]), "the text has 10 tokens, and calibration windows of 10 need at least 11"),
        (
            Corpus(["x" * 9, "x"], sampling="documents"),
            "none of the 2 documents .* more than 10 tokens .* longest .* 10",
        ),
    ],
)
def test_too_little_text_for_calibration(corpus, message):
    with pytest.raises(ValueError, match=message):
        sample(corpus, Bytes(), samples=2, length=10, seed=0)


def test_too_little_text_for_testing():
    with pytest.raises(ValueError, match="has 10 tokens, fewer than one window of 11"):
        windows(Corpus(["x" * 9]), Bytes(), 11)


def test_the_search_for_long_documents_ends(monkeypatch):
    monkeypatch.setattr("sparsekit.data.sampling.PATIENCE", 50)
    with pytest.raises(ValueError, match=r"50 tried.*`pack: true`"):
        sample(Corpus(["short"] * 1_000_000, sampling="documents"), Bytes(), samples=1, length=100, seed=0)


# Sources


def test_python_docs_keeps_test_text_out_of_calibration_text():
    from pydoc_data.topics import topics

    calibration, test = python_docs("calibration"), python_docs("test")
    assert list(test.documents) == [topics[name] for name in sorted(topics)[3::4]]
    held_out = {part.strip() for document in test.documents for part in document.split("\n\n")}
    seen = {part.strip() for document in calibration.documents for part in document.split("\n\n")}
    assert not held_out & seen
    assert sum(map(len, calibration.documents)) > 2 * sum(map(len, test.documents))


def test_text_gives_the_rows_of_the_hub(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n One sentence . \n")
    corpus = text("test", path=str(tmp_path / "wiki.test.raw"))
    assert list(corpus.documents) == ["", " = Title = \n", "", " One sentence . \n"]
    assert (corpus.separator, corpus.sampling) == ("\n\n", "windows")
    assert corpus == text("calibration", path=str(tmp_path / "wiki.test.raw"))


def test_text_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_text("One\n\ntwo \n")
    corpus = text("test", path=str(tmp_path / "a.txt"), separator=None)
    assert corpus.separator.join(corpus.documents) == "One\n\ntwo \n"


def test_local_wikitext_is_the_text_of_the_published_protocol(shared):
    # With GPT-2's tokenizer this text has 287,644 tokens, the figure in the transformers documentation on perplexity.
    corpus = text("test", path=str(shared / "data/wikitext-2-raw/wiki.test.raw"))
    joined = corpus.separator.join(corpus.documents)
    assert len(corpus.documents) == 4358
    assert hashlib.sha256(joined.encode()).hexdigest() == WIKITEXT


WIKITEXT = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"document {i} " * i, "body": f"b{i}", "n": i}) + "\n" for i in range(20))
    )
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_records(kind, records, tmp_path):
    path = records
    if kind == "parquet":
        import datasets

        path = tmp_path / "docs.parquet"
        datasets.load_dataset("json", data_files=str(records), split="train").to_parquet(path)
    if kind == "csv":
        import datasets

        path = tmp_path / "docs.csv"
        datasets.load_dataset("json", data_files=str(records), split="train").to_csv(path)
    source = getattr(corpora, kind)
    corpus = source("calibration", path=str(path))
    assert (corpus.sampling, corpus.separator, corpus.limit) == ("documents", " ", None)
    assert list(corpus.documents) == [f"document {i} " * i for i in range(20)]
    packed = source("calibration", path=str(path), field="body", pack=True)
    assert packed.sampling == "windows"
    assert packed.separator.join(packed.documents).startswith("b0 b1 b2")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a file into an empty hub cache, so that it is read as it would be after a download."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def add(repository, name, rows, revision="main"):
        import datasets

        folder = tmp_path / f"datasets--{repository.replace('/', '--')}"
        (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text("0" * 40)
        path = folder / "snapshots" / ("0" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows)
        table.to_parquet(path) if name.endswith("parquet") else table.to_json(path, compression="gzip")

    return add


def test_wikitext2(hub):
    for part in ("train", "test"):
        hub("Salesforce/wikitext", f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet", {"text": ["", f" {part} \n"]})
    calibration, test = wikitext2("calibration"), wikitext2("test")
    assert calibration.separator.join(calibration.documents) == "  train \n"
    assert test.separator.join(test.documents) == "\n\n test \n"


def test_ptb(hub):
    for part in ("train", "test"):
        rows = {"sentence": [f"{part} one", "two"]}
        hub("ptb-text-only/ptb_text_only", f"penn_treebank/{part}/0000.parquet", rows, "refs/convert/parquet")
    calibration, test = ptb("calibration"), ptb("test")
    assert calibration.separator.join(calibration.documents) == "train one two"
    assert test.separator.join(test.documents) == "test one two"


def test_c4(hub):
    hub("allenai/c4", "en/c4-train.00000-of-01024.json.gz", {"text": ["one", "two"], "url": ["a", "b"]})
    hub("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", {"text": [str(i) for i in range(1200)]})
    calibration, test = c4("calibration"), c4("test")
    assert list(calibration.documents) == ["one", "two"]
    assert calibration.sampling == "documents"
    assert c4("calibration", pack=True).sampling == "windows"
    assert list(test.documents) == [str(i) for i in range(1100)]
    assert (test.separator, test.limit, test.sampling) == (" ", 256, "windows")


@pytest.mark.parametrize(
    ("source", "name"),
    [("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4"), ("ptb", "ptb-text-only/ptb_text_only")],
)
def test_a_hub_out_of_reach(source, name, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{name} cannot be had.*source: jsonl, path: FILE") as caught:
        calibration_tokens({"source": source}, Bytes())
    assert "\n" not in str(caught.value)


# Settings


def test_calibration_tokens_are_what_the_source_and_sample_give(records):
    settings = {"source": "jsonl", "path": str(records), "samples": 4, "length": 30, "seed": 2}
    expected = sample(jsonl("calibration", path=str(records)), Bytes(), samples=4, length=30, seed=2)
    assert torch.equal(calibration_tokens(settings, Bytes(), positions=30, vocab=257), expected)
    short = {"source": str(records), "samples": 4, "length": 30, "seed": 2}
    assert torch.equal(calibration_tokens(short, Bytes()), expected)


def test_length_is_the_settings_own_whatever_the_model_could_take():
    tokens = calibration_tokens({"source": "python-docs", "samples": 2}, Bytes(), positions=131072)
    assert tokens.shape == (2, 2048)


@pytest.mark.parametrize(
    ("end", "source"), [("txt", "text"), ("raw", "text"), ("json", "jsonl"), ("parquet", "parquet"), ("csv", "csv")]
)
def test_a_path_is_read_by_its_end(end, source, tmp_path):
    path = tmp_path / f"a.{end}"
    path.write_text("x")
    function, options = resolve({"source": str(path), "samples": 1})
    assert function is getattr(corpora, source)
    assert options == {"path": str(path)}


def test_hyphen_and_underscore_are_the_same_letter():
    assert resolve({"source": "python_docs"}) == resolve({"source": "python-docs"}) == (python_docs, {})


MISTAKES = {
    "no source": ({}, "must name a source"),
    "name": ({"source": "wikitext"}, "did you mean `wikitext2`"),
    "option": ({"source": "c4", "packed": True}, "unknown option `packed`, did you mean `pack`"),
    "setting": ({"source": "python-docs", "lenght": 3}, "unknown option `lenght`, did you mean `length`"),
    "type": ({"source": "jsonl", "path": 3}, "option `path` is 3, must be a text"),
    "no path": ({"source": "jsonl"}, "option `path` is required"),
    "no file": ({"source": "jsonl", "path": "{tmp}/none.jsonl"}, "there is no file `.*none.jsonl`"),
    "no such path": ({"source": "{tmp}/none.txt"}, "there is no file `.*none.txt`"),
    "empty": ({"source": "{tmp}/empty.txt"}, "the file `.*empty.txt` is empty"),
    "unclear": ({"source": "{tmp}/notes.md"}, "not clear from its end"),
    "field": ({"source": "{tmp}/docs.jsonl", "field": "content"}, "no text field `content`.*`text`, `body`"),
    "not text": ({"source": "{tmp}/docs.jsonl", "field": "n"}, "no text field `n`"),
    "null": ({"source": "{tmp}/holes.jsonl"}, "has 1 records without a `text`"),
    "not json": ({"source": "{tmp}/notes.jsonl"}, "cannot be read as json"),
    "not utf-8": ({"source": "{tmp}/latin.txt"}, "cannot be read as text"),
    "short": ({"source": "{tmp}/docs.jsonl"}, "none of the 20 documents of docs.jsonl have more than 2048 tokens"),
    "samples": ({"source": "python-docs", "samples": 0}, "`samples` is 0, must be a whole number of at least 1"),
    "length": ({"source": "python-docs", "length": "2k"}, "`length` is '2k'"),
    "positions": ({"source": "python-docs", "length": 513}, "`length` is 513, but the model has 512 positions"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence(mistake, records, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "notes.jsonl").write_text("notes\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "holes.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    settings, message = MISTAKES[mistake]
    settings = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in settings.items()}
    positions = 512 if mistake == "positions" else None
    with pytest.raises(ValueError, match=message) as caught:
        calibration_tokens(settings, Bytes(), positions)
    assert isinstance(caught.value, registry.UnknownName) == (mistake == "name")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match=r"token 256, but the model embeds 200|token 1\d\d, but"):
        calibration_tokens({"source": "python-docs", "samples": 2, "length": 16}, Bytes(), vocab=100)


def test_the_tokenizers_length_warning_stays_inside(models):
    from transformers import AutoTokenizer

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    tokenizer = AutoTokenizer.from_pretrained(models / "tiny-llama")
    windows(python_docs("test"), tokenizer, 128)
    assert not said
    tokenizer("x " * 1000)  # the handler does hear it
    logging.getLogger("transformers").removeHandler(handler)
    assert any("longer than" in message for message in said)


def test_settings_are_checked_without_heavy_libraries():
    code = (
        "import sys; from sparsekit.data import resolve; resolve({'source': 'c4', 'pack': True});"
        "print(*{'torch', 'datasets', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture
def any_set(tmp_path):
    """A data set as `datasets` finds it on the hub or in a folder: two parts, texts and chats."""
    for part, count in {"train": 6, "validation": 3}.items():
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
        rows = [{"text": f"{part} {index}", "chat": chat, "n": index} for index in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_any_data_set(any_set, streaming):
    """The part that fits the split, the column that is named, the first rows; chat messages are written out."""
    found = corpora.hub("calibration", id=any_set, rows=4, streaming=streaming)
    assert list(found.documents) == [f"train {index}" for index in range(4)]
    assert list(corpora.hub("test", id=any_set, streaming=streaming).documents) == [f"validation {n}" for n in range(3)]
    [first, *_] = corpora.hub("test", id=any_set, field="chat", streaming=streaming).documents
    assert first == "user: hi\nassistant: there"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"field": "txt"}, "has no column `txt`, did you mean `text`"),
        ({"field": "n"}, "neither texts nor chat messages"),
        ({"part": "training"}, "has no part `training`, did you mean `train`"),
        ({"id": "nobody/nothing-at-all"}, "cannot be had"),
    ],
)
def test_mistakes_with_any_data_set(any_set, options, said):
    with pytest.raises(ValueError, match=said):
        corpora.hub("calibration", **{"id": any_set, **options})
