"""peft's LoRA on a pruned model: zeros stay through transformers' own trainer and through merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparsekit
from sparsekit.maths import NM

peft = pytest.importorskip("peft")
TINY = Path(__file__).parent / "models" / "tiny-llama"
TOKENS = torch.randint(0, 700, (8, 24), generator=torch.Generator().manual_seed(0))
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj", "up_proj"], "lora_dropout": 0.0}


def pruned() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                module.weight.mul_(NM(2, 4).keep(module.weight.abs()))
    return model


def zeros(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor == 0
        for name, tensor in model.state_dict().items()
        if "_proj" in name and "lora" not in name
    }


def train(model: Any, folder: Path) -> list[float]:
    """By transformers' Trainer; the losses on the way."""
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    options = transformers.TrainingArguments(
        str(folder), max_steps=6, learning_rate=5e-3, per_device_train_batch_size=4, report_to=[], logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_zeros_stay_through_training_and_merging(tmp_path: Path) -> None:
    model = pruned()
    before = zeros(model)
    model = sparsekit.mask_adapters(peft.get_peft_model(model, peft.LoraConfig(**LORA)))
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        apart = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    after = zeros(merged)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, apart, rtol=1e-4, atol=1e-4)
    moved = merged.model.layers[0].mlp.up_proj.weight - pruned().model.layers[0].mlp.up_proj.weight
    assert bool(moved.count_nonzero())
    again = sparsekit.mask_adapters(peft.PeftModel.from_pretrained(pruned(), tmp_path / "adapter"))
    with torch.no_grad():  # what peft saves is peft's own
        torch.testing.assert_close(again(input_ids=TOKENS).logits, apart, rtol=1e-4, atol=1e-4)


def test_without_it_no_zero_is_left(tmp_path: Path) -> None:
    model = peft.get_peft_model(pruned(), peft.LoraConfig(**LORA))
    train(model, tmp_path)
    merged = model.merge_and_unload()
    assert not bool((merged.model.layers[0].mlp.up_proj.weight == 0).any())


def test_gradients_are_those_of_the_masked_weight() -> None:
    """Against autograd of W + mask * scaling (B A), written out."""
    model = sparsekit.mask_adapters(peft.get_peft_model(pruned(), peft.LoraConfig(**LORA)))
    module = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        module.lora_B["default"].weight.normal_()
    x = torch.randn(5, 64, dtype=module.weight.dtype)
    module(x).square().sum().backward()
    a, b = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    left, right = b.detach().clone().requires_grad_(), a.detach().clone().requires_grad_()
    weight = module.base_layer.weight.detach()
    (x @ (weight + (weight != 0) * 4.0 * (left @ right)).t()).square().sum().backward()
    torch.testing.assert_close(b.grad, left.grad)
    torch.testing.assert_close(a.grad, right.grad)


def test_adapters_that_are_switched_off_do_nothing() -> None:
    model = sparsekit.mask_adapters(peft.get_peft_model(pruned(), peft.LoraConfig(**LORA)))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.normal_()
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=TOKENS).logits, pruned()(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_dropout": 0.1}, "has lora_dropout 0.1, which no mask can follow: give lora_dropout=0"),
        ({"use_dora": True}, "more than B A, such as DoRA"),
    ],
)
def test_what_no_mask_can_follow_is_refused(settings: dict[str, Any], said: str) -> None:
    model = peft.get_peft_model(pruned(), peft.LoraConfig(**LORA | settings))
    with pytest.raises(ValueError, match=said):
        sparsekit.mask_adapters(model)


def test_a_dense_model_has_nothing_to_hold() -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    with pytest.raises(ValueError, match="no linear with an adapter of peft's LoRA has zeros"):
        sparsekit.mask_adapters(peft.get_peft_model(dense, peft.LoraConfig(**LORA)))
