import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import log_softmax

from sparsekit.data import windows
from sparsekit.data.corpora import python_docs
from sparsekit.measure import check_evaluation, evaluate, losses, perplexity
from sparsekit.measure.evaluation import tasks

torch.set_num_threads(1)


def small(positions=64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from uniform, so that an error in the average shows
    return model


def draw(*shape, below=50):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


class Fixed(nn.Module):
    """A model whose logits are the same everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert use_cache is False
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


# Perplexity


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_perplexity_is_the_loop_over_predictions_in_float64(batch):
    model, tokens = small(), draw(5, 20)
    means = []
    with torch.no_grad():
        for sequence in tokens:
            logits = model(input_ids=sequence[None]).logits[0].double()
            losses = [-log_softmax(logits[i], -1)[sequence[i + 1]].item() for i in range(19)]
            means.append(math.fsum(losses) / 19)
    assert perplexity(model, tokens, batch=batch) == pytest.approx(math.exp(math.fsum(means) / 5), rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    assert perplexity(Fixed(torch.zeros(37)), draw(3, 8, below=37)) == pytest.approx(37, rel=1e-6)


def test_a_bad_model_has_a_large_perplexity_and_not_an_infinite_one():
    logits = torch.tensor([0.0, 200.0])  # the probability of token 0 is 0 in fp32
    assert perplexity(Fixed(logits), torch.zeros(2, 4, dtype=torch.long)) == pytest.approx(math.exp(200), rel=1e-4)


def test_a_broken_model_is_not_averaged_away():
    tokens = torch.tensor([[0, 1], [0, 0]])
    assert math.isnan(perplexity(Fixed(torch.tensor([0.0, math.nan])), tokens))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training):
    model = Fixed(torch.zeros(5)).train(training)
    perplexity(model, draw(1, 4, below=5))
    assert model.training is training


def test_half_precision_logits_are_taken_to_fp32():
    model, tokens = small().bfloat16(), draw(4, 20)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    losses = -log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])
    assert perplexity(model, tokens, batch=4) == pytest.approx(losses.mean().exp().item(), rel=1e-5)


# Sets


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_tiny_models_know_their_text(models, name):
    # Untrained they are above 768, and the frequencies of the tokens alone give 250 (tests/models/README.md).
    found = evaluate(*load(models / name), {"perplexity": ["python-docs"], "length": 128})
    assert found["perplexity"]["python-docs"] < 40
    assert found["context"]["python-docs"]["length"] == 128
    assert found["context"]["python-docs"]["windows"] > 100
    assert found["tasks"] == {}


def test_sets_by_name_path_and_mapping(models, tmp_path):
    model, tokenizer = load(models / "tiny-llama")
    path = tmp_path / "page.txt"
    path.write_text("The import statement binds a name.\n" * 60)
    own = {"source": "python-docs", "name": "short", "length": 32, "windows": 3}
    plain = {"source": str(path), "separator": None, "name": "plain"}
    found = evaluate(model, tokenizer, {"perplexity": [str(path), own, plain], "length": 64, "batch": 2})
    assert list(found["perplexity"]) == ["page.txt", "short", "plain"]
    context = found["context"]
    assert (context["short"]["length"], context["short"]["windows"]) == (32, 3)
    tokens = windows(python_docs("test"), tokenizer, 32, 3)
    assert found["perplexity"]["short"] == pytest.approx(perplexity(model, tokens), rel=1e-5)
    ids = tokenizer(path.read_text())["input_ids"]
    assert (context["plain"]["length"], context["plain"]["windows"]) == (64, len(ids) // 64)
    assert len({each["digest"] for each in context.values()}) == 3
    each = losses(model, tokens, batch=2)
    error = float(each.mean().exp() * each.std() / 3**0.5)
    assert found["perplexity_stderr"]["short"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"length": 257}, {"perplexity": [{"source": "python-docs", "length": 300}]}])
def test_a_context_longer_than_the_model_has_positions(models, settings):
    with pytest.raises(ValueError, match=r"python-docs: `length` is \d+, but the model has 256 positions"):
        evaluate(*load(models / "tiny-opt"), {"perplexity": ["python-docs"]} | settings)


# Tasks

ARC = {
    "name": "arc_easy",
    "prompt": "Question: {{question}}\nAnswer:",
    "choices": "{{choices.text}}",
    "label": "{{choices.label.index(answerKey)}}",
}
PIQA = {
    "name": "piqa",
    "prompt": "Question: {{goal}}\nAnswer:",
    "choices": "{{[sol1, sol2]}}",
    "label": "{{label}}",
}


@pytest.fixture
def quiz(tmp_path):
    words = ["import", "statement", "expression", "a list of names", "the exception that was raised", "yield"]
    path = tmp_path / "quiz.jsonl"
    with path.open("w") as file:
        for i in range(12):
            options = [words[i % 6], words[(i + 2) % 6], words[(i + 3) % 6]]
            file.write(json.dumps({"ask": f"The {words[(i * 2) % 6]} is", "options": options, "right": i % 3}) + "\n")
    return path


def by_hand(model, tokenizer, records):
    """acc and acc_norm from the log probabilities of one forward pass for each choice, in float64."""
    right = torch.zeros(2)
    for record in records:
        scores = []
        for choice in record["options"]:
            start = len(tokenizer(record["ask"])["input_ids"])
            ids = torch.tensor(tokenizer(f"{record['ask']} {choice}")["input_ids"])
            with torch.no_grad():
                logs = log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
            scores.append(logs.gather(-1, ids[1:, None])[start - 1 :].sum().item())
        lengths = [len(choice) for choice in record["options"]]
        norm = [score / length for score, length in zip(scores, lengths, strict=True)]
        right += torch.tensor([scores.index(max(scores)) == record["right"], norm.index(max(norm)) == record["right"]])
    return (right / len(records)).tolist()


@pytest.mark.parametrize("label", ["{{right}}", "right", "{{options[right]}}"])
def test_a_local_task_is_scored_as_by_hand(models, quiz, label):
    model, tokenizer = load(models / "tiny-llama")
    entry = {"name": "quiz", "path": str(quiz), "prompt": "{{ask}}", "choices": "{{options}}", "label": label}
    found = tasks(model, tokenizer, [entry], batch=3)["quiz"]
    acc, acc_norm = by_hand(model, tokenizer, [json.loads(line) for line in quiz.read_text().splitlines()])
    assert found["n"] == 12
    assert (found["acc"], found["acc_norm"]) == pytest.approx((acc, acc_norm))
    assert found["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 11))


def test_limits_and_a_yaml_file(models, quiz, tmp_path):
    model, tokenizer = load(models / "tiny-opt")
    entry = {"name": "mine", "path": str(quiz), "prompt": "{{ask}}", "choices": ["a", "b", "c"], "label": "{{right}}"}
    (tmp_path / "theirs.yaml").write_text(
        f"""
task: theirs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {quiz}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: [a, b, c]
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
    )
    settings = {"tasks": [entry | {"limit": 4}, str(tmp_path / "theirs.yaml")], "limit": 6}
    found = evaluate(model, tokenizer, settings)["tasks"]
    assert {name: figures["n"] for name, figures in found.items()} == {"mine": 4, "theirs": 6}
    assert set(found["mine"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    assert set(found["theirs"]) == {"acc", "acc_stderr", "n"}


def test_real_tasks_from_local_files(models, shared):
    folder = shared / "data/zeroshot"
    entries = [task | {"path": str(folder / f"{task['name']}.validation.jsonl")} for task in (ARC, PIQA)]
    found = tasks(*load(models / "tiny-llama"), entries, limit=8, batch=4)
    assert [found[name]["n"] for name in ("arc_easy", "piqa")] == [8, 8]
    assert all(0 <= found[name][metric] <= 1 for name in found for metric in ("acc", "acc_norm"))


def test_tasks_are_quiet(models, quiz, capfd, caplog):
    entry = {"name": "quiz", "path": str(quiz), "prompt": "{{ask}}", "choices": "{{options}}", "label": "{{right}}"}
    tasks(*load(models / "tiny-llama"), [entry], limit=1)
    assert "fatal" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perplexities": []}, "unknown key `perplexities`, did you mean `perplexity`"),
        ({"perplexity": ["wikitext"]}, "did you mean `wikitext2`"),
        ({"perplexity": [{"source": "python-docs", "samples": 3}]}, "unknown option `samples`"),
        ({"perplexity": ["python-docs", {"source": "python-docs"}]}, "two perplexity sets are called `python-docs`"),
        ({"perplexity": ["none.txt"]}, "there is no file `none.txt`"),
        ({"perplexity": [{"source": "python-docs", "windows": 0}]}, "`python-docs: windows` is 0"),
        ({"length": 1}, "`length` is 1, must be a whole number of at least 2"),
        ({"batch": 2.5}, "`batch` is 2.5, must be a whole number"),
        ({"limit": True}, "`limit` is True, must be a whole number"),
        ({"tasks": ["none.yaml"]}, "there is no task file `none.yaml`"),
        ({"tasks": [7]}, "a task is a name, a YAML file or a mapping"),
        ({"tasks": [{"name": "arc"}]}, "task `arc` needs `choices`, `label`, `path`, `prompt`"),
        ({"tasks": [ARC | {"path": "none.jsonl"}]}, "task `arc_easy`: there is no file `none.jsonl`"),
        ({"tasks": [ARC | {"promt": "x"}]}, "task `arc_easy`: unknown key `promt`, did you mean `prompt`"),
    ],
)
def test_a_mistake_is_seen_without_a_model(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_evaluation(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": "{{right + 3}}"}, "the label of the first record is none of its choices"),
        ({"label": "{{right * 2}}"}, "record 2 has the label 4, which is none of its choices"),
        ({"label": "{{ask}}"}, "record 0 has the label 'The import is', which is none of its choices"),
        ({"prompt": "{{question}}"}, "'question' is undefined"),
    ],
)
def test_a_task_that_does_not_fit_its_records(models, quiz, wrong, message):
    entry = {"name": "quiz", "path": str(quiz), "prompt": "{{ask}}", "choices": "{{options}}", "label": "{{right}}"}
    with pytest.raises(ValueError, match=f"task `quiz` cannot be loaded.*{message}"):
        tasks(*load(models / "tiny-llama"), [entry | wrong])


@pytest.mark.long
def test_a_task_that_lm_eval_does_not_have(models):
    with pytest.raises(ValueError, match="lm-eval has no task `arc_eazy`; the nearest names are: arc_easy"):
        tasks(*load(models / "tiny-llama"), ["arc_eazy"])
