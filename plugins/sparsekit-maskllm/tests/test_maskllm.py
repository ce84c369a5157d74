import itertools
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from sparsekit import cli, registry
from sparsekit.maths import NM, parse
from sparsekit.testing import begin, check_stage, context, tiny_model, tiny_tokens

from sparsekit_maskllm import MaskLLM, candidates, maskllm

TINY = Path(__file__).parents[3] / "tests" / "models" / "tiny-llama"
RECIPE = """\
model: {model}
pattern: "2:4"
calibration: {{source: python-docs, samples: 128, length: 64}}
stages: {stages}
evaluate: {{perplexity: [{{source: python-docs, windows: 24}}], length: 64, samples: false}}
output: {output}
"""


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_candidates_are_all_masks_of_a_group(pattern):
    kept, group = map(int, pattern.split(":"))
    every = {each for each in itertools.product((0, 1), repeat=group) if sum(each) == kept}
    assert {tuple(map(int, row)) for row in candidates(parse(pattern)).tolist()} == every


@pytest.mark.parametrize("options", [{}, {"estimator": "policy", "draws": 2}, {"prior": None}, {"prior": "wanda"}])
def test_contract(options):
    check_stage(maskllm, steps=2, batch=2, **options)


def learned(monkeypatch, tmp_path, wanted, **options):
    """Masks learned where the loss is how many weights differ from `wanted`: the best of each group is known."""
    here = context(tiny_model(), tiny_tokens(), tmp_path, pattern="2:4")
    from lightning.pytorch import Trainer

    def loss(self, masks, tokens):
        return sum(
            (mask - wanted[name].to(mask)).square().mean() for name, mask in zip(self.linears, masks, strict=True)
        )

    monkeypatch.setattr(MaskLLM, "_loss", loss)
    module, data, _ = begin(maskllm, here, prior="magnitude", **options)
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    return {name: kept for block in here.blocks for name, kept in block.masks.items()}


def test_it_finds_the_best_candidate_of_every_group(monkeypatch, tmp_path):
    random = torch.Generator().manual_seed(3)
    here = context(tiny_model(), tiny_tokens(), tmp_path, pattern="2:4")
    wanted = {
        name: NM(2, 4).keep(torch.rand(linear.shape, generator=random))
        for block in here.blocks
        for name, linear in block.linears.items()
    }
    found = learned(monkeypatch, tmp_path, wanted, steps=80, learning_rate=1.0)
    right = [float((found[name] == wanted[name]).float().mean()) for name in wanted]
    assert min(right) > 0.99, right


def test_it_beats_its_prior_on_other_text(tmp_path):
    """The mask of SparseGPT with the dense model's weights is what it starts from."""
    found = {}
    for name, steps in (("prior", 1), ("learned", 40)):
        file = tmp_path / f"{name}.yaml"
        rate = 1.0e-9 if name == "prior" else 0.3
        stages = f"[{{maskllm: {{steps: {steps}, batch: 8, learning_rate: {rate}}}}}]"
        file.write_text(RECIPE.format(model=TINY, stages=stages, output=tmp_path / name))
        assert cli.main(["fit", "--recipe", str(file)]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["verified"] is True
        found[name] = report["evaluation"]["pruned"]["perplexity"]["python-docs"]
    assert found["learned"] < 0.9 * found["prior"], found
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "learned" / "model"))
    for name in report["sparsity"]["per_linear"]:
        weight = pruned[f"{name}.weight"]
        assert parse("2:4").satisfied(weight)
        assert torch.equal(weight, dense[f"{name}.weight"] * (weight != 0))  # kept weights are the dense model's


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 1}, "option `draws` is 1, must be above 1"),
        ({"prior": "wandaa"}, "did you mean `wanda`"),
        ({"temperature": [1.0]}, "temperature is .*; give two numbers above 0"),
        ({"estimator": "grad"}, "option `estimator`"),
    ],
)
def test_mistakes(options, said, tmp_path):
    here = context(tiny_model(), tiny_tokens(), tmp_path, pattern="2:4")
    with pytest.raises(ValueError, match=said):
        begin(maskllm, here, **options)


def test_another_pattern(tmp_path):
    with pytest.raises(ValueError, match="give n:m, such as 2:4"):
        begin(maskllm, context(tiny_model(), tiny_tokens(), tmp_path, pattern="50%"))
    assert registry.describe(registry.find("stages", "maskllm")).source.startswith("Fang et al. 2024")


def test_what_was_not_learned_is_not_taken(tmp_path):
    """Training that leads away from the best mask, its start: on held-out text the start is better, and stays."""
    for held_out in (0.25, 0.0):
        here = context(tiny_model(), tiny_tokens(), tmp_path, pattern="2:4")
        module, data, callbacks = begin(maskllm, here, steps=9, learning_rate=3.0, held_out=held_out)

        def loss(masks, tokens, module=module):
            pairs = zip(masks, module.first.values(), strict=True)
            away = sum((mask - first.float()).square().sum() for mask, first in pairs)
            return -away if masks[0].requires_grad else away

        module._loss = loss
        options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        Trainer(**options, callbacks=callbacks).fit(module, data)
        masks = {name: mask for block in here.blocks for name, mask in block.masks.items()}
        stayed = all(torch.equal(masks[name], mask) for name, mask in module.first.items())
        assert stayed == ("held_out" in here.notes["maskllm"]) == bool(held_out)
