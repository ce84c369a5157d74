"""lm-eval over a model whose blocks rest on disk: the figures of lm-eval's own class over the model in memory."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sparsekit.measure import Walked, predictions
from sparsekit.measure.harness import harness_for
from sparsekit.model import adopt, discover, load, load_resting, rests

TEXTS = [
    ("The module has", " a function"),
    ("The module has", " two classes and one that is not documented, of which more is said in the next section"),
    ("", "import os"),
    ("x = 1\ny = 2\nprint(x + y)  # which is ", "3"),
    ("words " * 300, "and more"),  # longer than there are positions
]


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture(params=["llama", "mixtral", "gemma3_text", "bloom", "mamba2"])
def both(request, tiny: Callable[[str], Path]) -> tuple[Any, Any, list[Any]]:
    """lm-eval's own over the model in memory, ours over the resting one, and its blocks."""
    folder = tiny(request.param)
    whole, tokenizer = load(folder)
    model = load_resting(folder)
    blocks = discover(load(folder)[0], torch.arange(5, 13)[None])
    mine = adopt(model, blocks)
    return (
        HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=2),
        harness_for(model, tokenizer, 2, Walked(mine)),
        mine,
    )


def test_likelihoods_are_lm_evals_own(both, monkeypatch):
    theirs, ours, blocks = both
    filled = Counter()
    original = predictions.filled
    monkeypatch.setattr(
        predictions, "filled", lambda some, device: filled.update(b.name for b in some) or original(some, device)
    )
    expected = theirs.loglikelihood(asked("loglikelihood", TEXTS), disable_tqdm=True)
    found = ours.loglikelihood(asked("loglikelihood", TEXTS), disable_tqdm=True)
    for (mine, top), (other, likeliest) in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-3) and top == likeliest
    assert set(filled) == {block.name for block in blocks} and max(filled.values()) <= 5 < len(TEXTS) * len(blocks)
    assert all(map(rests, blocks))


def test_an_answer_longer_than_the_positions_is_refused(both):
    _, ours, _ = both
    with pytest.raises(ValueError, match="an answer of 9000 tokens, and the model has"):
        ours._loglikelihood_tokens([(("a", "b"), [5], [6] * 9000)])


def test_of_whole_texts_and_what_is_generated(both):
    theirs, ours, blocks = both
    texts = asked("loglikelihood_rolling", [("The module has two classes, " * 40,), ("import os",)])
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, rel=1e-4)
    assert all(map(rests, blocks))
    given = asked("generate_until", [("The module has", {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False})])
    assert ours.generate_until(given, disable_tqdm=True) == theirs.generate_until(given, disable_tqdm=True)
    assert all(map(rests, blocks))


def test_a_model_in_memory_is_asked_by_lm_evals_own(models):
    model, tokenizer = load(models / "tiny-llama")
    assert type(harness_for(model, tokenizer, 2, Walked())) is HFLM
