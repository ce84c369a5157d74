from contextlib import contextmanager
from pathlib import Path

import entrypoints
import pytest
import torch
import transformers
from sparsekit import registry
from sparsekit.data import calibration_tokens
from sparsekit.measure import perplexity as measured
from sparsekit.measure import perplexity_windows
from sparsekit.model import load_plain
from sparsekit.model.structure import choose, find_units, masking
from sparsekit.testing import check_criterion, context

from sparsekit_bonsai import _prior, bonsai, fit

TINY = Path(__file__).parents[3] / "tests" / "models" / "tiny-llama"
TEXT = torch.randint(2, 64, (16, 8), generator=torch.Generator().manual_seed(0))


def toy():
    """A random model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return model


def test_installed_under_its_name():
    assert entrypoints.get_group_named("sparsekit.criteria")["bonsai"].load() is bonsai


def test_contract():
    check_criterion(bonsai, masks=10, samples=2, step="20%")


def test_the_regression_finds_a_linear_truth():
    draw = torch.Generator().manual_seed(0)
    first = torch.rand(100, 20, generator=draw) < 0.5
    dropped = torch.cat([first, ~first]).double()
    truth = torch.randn(20, generator=draw, dtype=torch.float64)
    losses = dropped @ truth + 3 + 0.01 * torch.randn(200, generator=draw, dtype=torch.float64)
    found = fit(dropped, losses)
    # all masks of a pair drop the same number together, so only differences from the mean are known
    torch.testing.assert_close(found, truth, rtol=0, atol=0.02)
    noisy = fit(dropped[:, :1].expand(-1, 20).contiguous(), torch.randn(200, generator=draw, dtype=torch.float64))
    assert noisy.abs().max() < 0.05  # nothing to find: the ridge grows


def test_it_finds_the_units_that_matter(monkeypatch, tmp_path):
    """Where the loss is a sum over the units that are dropped, and noise: a third matters, whatever their size."""
    model = toy()
    work = context(model, TEXT, tmp_path, batch=8)
    units = find_units(model, work.blocks)
    matters = torch.arange(len(units)) % 3 == 1
    draw = torch.Generator().manual_seed(0)
    seen = []

    @contextmanager
    def masking(blocks, units):
        yield seen.append

    def loss(work, tokens):
        assert len(tokens) == 4
        return 3 + float((matters & ~seen[-1]).sum()) + 0.1 * float(torch.randn((), generator=draw))

    monkeypatch.setattr("sparsekit_bonsai.masking", masking)
    monkeypatch.setattr(type(work), "loss", loss)
    found = bonsai(work, units, remove=0.3, step=0.1, masks=60, samples=4)
    gone = found < 0
    other = gone ^ ~choose(units, found, 0.3, budgets="joint")  # what went is what the budget takes, but for the last
    assert int(other.sum()) <= 1 + int(units.parameters.max() / units.parameters.min())
    assert gone.sum() > 8 and (gone & matters).sum() <= 0.1 * gone.sum()
    sizes = _prior(work, units, torch.ones(len(units), dtype=torch.bool))
    smallest = ~choose(units, sizes, 0.3, budgets="joint")
    assert (smallest & matters).sum() >= 0.2 * smallest.sum()  # their size does not tell
    assert len(seen) % 61 == 0 and all((~each).sum() <= len(units) // 2 for each in seen)


def test_it_beats_random_units_on_a_trained_model(tmp_path):
    model, tokenizer = load_plain(TINY)
    settings = {"source": "python-docs", "samples": 32, "length": 64, "seed": 0}
    work = context(model, calibration_tokens(settings, tokenizer, 256, 768), tmp_path, batch=8)
    units = find_units(model, work.blocks)
    found = bonsai(work, units, remove=0.2, step=0.1, masks=30, samples=8)
    tests = perplexity_windows(
        {"perplexity": [{"source": "python-docs", "windows": 32}], "length": 128}, tokenizer, 256
    )
    [text] = tests.values()

    def perplexity(scores):
        with masking(work.blocks, units) as mask:
            mask(choose(units, scores, 0.2, budgets="joint"))
            return measured(model, text, batch=8)

    draw = torch.Generator().manual_seed(0)
    random = [perplexity(torch.rand(len(units), generator=draw)) for _ in range(5)]
    assert perplexity(found) < 0.9 * sum(random) / 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masks": 11}, "option `masks` is 11, must be even"),
        ({"masks": 4}, "option `masks` is 4, must be at least 10"),
        ({"samples": 0}, "option `samples` is 0, must be at least 1"),
        ({"step": "200%"}, "option `step` is '200%'"),
    ],
)
def test_mistakes(options, said):
    [problem] = registry.option_problems(bonsai, {"remove": "30%", **options}).values()
    assert problem.startswith(said)
