"""Text and records for recovery: what is predicted, how rows are packed, in which order they come."""

import json
from itertools import chain

import pytest
import torch
from families import SETTINGS, build

from sparsekit.model import load_tokenizer
from sparsekit.system import Team
from sparsekit.train import Batches
from sparsekit.train.losses import Objective, text_loss
from sparsekit.train.records import IGNORED, example, format_of
from sparsekit.train.rows import Rows, check_training_source, keeps_apart, training_rows

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(models):
    return load_tokenizer(models / "tiny-llama")


@pytest.fixture
def alpaca(tmp_path):
    """A file of instruction records of many lengths, each with a word of its own."""
    records = [
        {"instruction": f"Say it {i} times.", "input": f"word {i}" if i % 2 else "", "output": f"w{i} " * (1 + i % 9)}
        for i in range(60)
    ]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    return file


def rows_of(settings, tokenizer, **options):
    return training_rows(settings, tokenizer, **({"length": 64, "rows": 20, "validation": 0.1, "seed": 0} | options))


def predicted(ids, labels):
    return [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]


# Records


def test_only_the_answer_of_an_instruction_is_predicted(tokenizer):
    record = {"instruction": "Count.", "input": "to two", "output": "one two"}
    ids, labels = example(record, "instruction", tokenizer)
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    assert tokenizer.decode(predicted(ids, labels)) == "one two<|end|>"
    prompt = tokenizer.decode(ids[: labels.count(IGNORED)])
    assert prompt.endswith("### Input:\nto two\n\n### Response:\n") and "Count." in prompt
    assert "### Input" not in tokenizer.decode(example(record | {"input": ""}, "instruction", tokenizer)[0])


def test_all_that_the_assistant_says_is_predicted(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, labels = example({"messages": messages}, "chat", tokenizer)
    assert tokenizer.decode(ids) == "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)
    assert tokenizer.decode(predicted(ids, labels)) == "hello<|end|>ciao<|end|>"
    ids, labels = example({"instruction": "greet", "input": "", "output": "hello"}, "chat", tokenizer)
    assert tokenizer.decode(predicted(ids, labels)) == "hello<|end|>"


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    """What it drops once a conversation goes on cannot be predicted in the whole of it."""
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}<|{{ message['role'] }}|>"
        "{{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, labels = example({"messages": messages}, "chat", tokenizer)
    assert tokenizer.decode(predicted(ids, labels)) == "ciao<|end|>"


def test_the_format_is_seen_from_the_fields():
    assert format_of(["messages", "id"]) == "chat"
    assert format_of(["instruction", "input", "output"]) == "instruction"
    assert format_of(["text"]) == "text"
    assert format_of(["instruction", "output"], "chat") == "chat"
    with pytest.raises(ValueError, match="format chat needs records with `messages`"):
        format_of(["text"], "chat")
    with pytest.raises(ValueError, match="it can be auto, text, instruction, chat"):
        format_of(["text"], "alpaca")


# Packing


def test_text_is_cut_without_gap(tokenizer, tmp_path):
    """A text in one piece: the rows are its tokens in order, those for validation first."""
    file = tmp_path / "some.txt"
    file.write_text("\n\n".join(f"paragraph {i} of some text" for i in range(300)))
    training, held_out = rows_of({"source": str(file), "separator": None}, tokenizer, rows=30)
    whole = tokenizer(file.read_text())["input_ids"]
    assert len(training) == 30 and len(held_out) == 3
    assert torch.cat((held_out.ids, training.ids)).flatten().tolist() == whole[: 33 * 64]
    assert torch.equal(training.ids, training.labels)


def test_a_long_text_is_read_in_pieces(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "some.txt"
    file.write_text("".join(f"line {i} of some text\n" for i in range(400)))
    settings = {"source": str(file), "separator": " "}
    whole = rows_of(settings, tokenizer)
    monkeypatch.setattr("sparsekit.train.rows.PIECE", 1000)
    pieces = rows_of(settings, tokenizer)  # other tokens at the seams, the same text
    texts = [tokenizer.decode(torch.cat((held_out.ids, rows.ids)).flatten()) for rows, held_out in (whole, pieces)]
    assert texts[0][:2500] == texts[1][:2500] and len(texts[0]) > 2500


def test_documents_are_shuffled_and_ended(tokenizer, tmp_path):
    file = tmp_path / "documents.jsonl"
    texts = [f"this is document {i}" for i in range(200)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    training, held_out = rows_of({"source": str(file)}, tokenizer)
    parts = tokenizer.decode(torch.cat((held_out.ids, training.ids)).flatten()).split("<|end|>")[:-1]
    assert len(parts) > 50 and set(parts) <= set(texts) and parts != texts[: len(parts)]
    other, _ = rows_of({"source": str(file)}, tokenizer, seed=1)
    again, _ = rows_of({"source": str(file)}, tokenizer)
    assert torch.equal(training.ids, again.ids) and not torch.equal(training.ids, other.ids)


def test_records_stay_whole_and_none_is_lost(tokenizer, alpaca):
    """Every answer is in exactly one row, complete, and after its prompt."""
    training, held_out = rows_of({"source": str(alpaca)}, tokenizer, length=256, rows=1000)
    both = zip(chain(held_out.ids, training.ids), chain(held_out.labels, training.labels), strict=True)
    answers = []
    for ids, labels in both:
        said = tokenizer.decode(predicted(ids.tolist(), labels.tolist()))
        answers += said.split("<|end|>")[:-1]
        assert all(
            f"Say it {answer.split()[0][1:]} times." in tokenizer.decode(ids) for answer in said.split("<|end|>")[:-1]
        )
    assert sorted(answers) == sorted(record["output"].strip() for record in json.loads(alpaca.read_text()))
    assert sum((labels != IGNORED).sum() for labels in training.labels) > 0
    filled = sum(int((row != tokenizer.eos_token_id).sum()) for row in training.ids)
    assert filled > 0.75 * training.ids.numel()  # records of 60 to 110 tokens in rows of 256


def test_too_long_records_are_cut_and_said(tokenizer, alpaca):
    with pytest.warns(UserWarning, match="records are longer than 80 tokens and were cut"):
        rows_of({"source": str(alpaca)}, tokenizer, length=80, rows=4)
    with pytest.warns(UserWarning, match="have no answer within 32 tokens"), pytest.raises(ValueError, match="0 rows"):
        rows_of({"source": str(alpaca)}, tokenizer, length=32)


def test_records_read_as_text_where_asked(tokenizer, alpaca):
    training, _ = rows_of({"source": str(alpaca), "field": "output", "pack": True}, tokenizer, length=16, rows=4)
    assert torch.equal(training.ids, training.labels)


def test_the_real_records(shared, tokenizer):
    training, held_out = rows_of({"source": str(shared / "data/alpaca/alpaca_en_demo.json")}, tokenizer, length=256)
    assert len(training) == 20 and len(held_out) == 2
    share = float((training.labels != IGNORED).float().mean())
    assert 0.2 < share < 0.9


# Splitting and order


def test_validation_rows_are_others(tokenizer):
    training, held_out = rows_of({"source": "python-docs"}, tokenizer, rows=200)
    assert len(training) == 200 and len(held_out) == 20
    assert not {tuple(row) for row in training.ids.tolist()} & {tuple(row) for row in held_out.ids.tolist()}


def test_scarce_text_is_shared_out(tokenizer):
    training, held_out = rows_of({"source": "python-docs"}, tokenizer, rows=10**6, length=256)
    assert len(held_out) == pytest.approx(0.1 * len(training), abs=2)
    none, one = rows_of({"source": "python-docs"}, tokenizer, validation=0.0)
    assert len(one) == 1 and len(none) == 20


def numbers(batches):
    return [batch[2].tolist() for batch in batches]


def test_each_pass_has_every_row_once():
    rows = Rows(torch.arange(10)[:, None], torch.arange(10)[:, None])
    batches = numbers(Batches(rows, count=10, batch=3))
    assert len(batches) == 10 and {len(batch) for batch in batches} == {3}
    passes = list(zip(*[iter(list(chain(*batches)))] * 10, strict=True))
    assert all(sorted(each) == list(range(10)) for each in passes) and len(set(passes)) == 3
    assert numbers(Batches(rows, count=10, batch=3)) == batches != numbers(Batches(rows, count=10, batch=3, seed=1))


def test_batches_go_on_where_they_were_left():
    rows = Rows(torch.arange(10)[:, None], torch.arange(10)[:, None])
    first, second = (Batches(rows, count=8, batch=3) for _ in range(2))
    whole = numbers(Batches(rows, count=8, batch=3))
    given = iter(first)
    assert [next(given)[2].tolist() for _ in range(3)] == whole[:3]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert numbers(second) == whole[3:]
    with pytest.raises(ValueError, match="the training text is not what the interrupted run read"):
        Batches(rows[:9], count=8, batch=3).load_state_dict(first.state_dict())


def test_processes_share_a_batch():
    rows = Rows(torch.arange(32)[:, None], torch.arange(32)[:, None])
    alone = numbers(Batches(rows, count=4, batch=4))
    shares = [numbers(Batches(rows, count=4, batch=2, team=Team(rank, 2))) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]


# Mistakes


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("wikitext3", "did you mean `wikitext2`"),
        ({"source": "no-such-file.jsonl"}, "there is no file"),
        ({"source": "python-docs", "format": "alpaca"}, "`format` is 'alpaca'"),
        ({"source": "python-docs", "fromat": "text"}, "unknown option `fromat`"),
    ],
)
def test_what_cannot_be_a_source(source, said):
    with pytest.raises(ValueError, match=said):
        check_training_source(source)


def test_records_need_a_file(tokenizer):
    with pytest.raises(ValueError, match="format chat needs a local JSON or Parquet file"):
        rows_of({"source": "python-docs", "format": "chat"}, tokenizer)


def test_a_chat_needs_a_template(tokenizer, alpaca):
    with pytest.raises(ValueError, match="no chat template"):
        rows_of({"source": str(alpaca), "format": "chat"}, tokenizer)


def test_too_little_text(tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(ValueError, match="gives 0 rows of 64 tokens, and recovery needs at least 2"):
        rows_of({"source": str(file)}, tokenizer)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT2", "OPT"])
def test_records_of_a_row_do_not_see_one_another(tokenizer, alpaca, family):
    """The loss of rows is that of every record alone; OPT gives positions but no mask, so there each has a row."""
    settings = SETTINGS[family] | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = build(family, settings=settings)
    apart = keeps_apart(model)
    assert apart == (family != "OPT")
    parts = rows_of({"source": str(alpaca)}, tokenizer, length=256, rows=1000, together=apart)
    records = json.loads(alpaca.read_text())
    with torch.no_grad():
        seen = [Objective().validation(model, part) for part in parts]
        examples = [example(record, "instruction", tokenizer) for record in records]
        pairs = [(model(torch.tensor([ids])).logits, torch.tensor([labels])) for ids, labels in examples]
        alone = [(text_loss(own[:, :-1], said[:, 1:]), int((said[:, 1:] >= 0).sum())) for own, said in pairs]
    assert sum(count for _, count in seen) == sum(count for _, count in alone)
    assert float(sum(loss for loss, _ in seen)) == pytest.approx(float(sum(loss for loss, _ in alone)), rel=1e-5)
    assert (sum(map(len, parts)) < len(records)) == apart
