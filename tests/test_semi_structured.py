"""2:4 linears as torch's semi-structured tensors: which they are, and what is said where they cannot be."""

import pytest
import torch
from families import build

import sparsekit
from sparsekit.maths import parse
from sparsekit.model import find_blocks, two_of_four
from sparsekit.model.semi_structured import make_semi_structured


def pruned() -> torch.nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    from families import SETTINGS

    model = build("Llama", settings=SETTINGS["Llama"] | sizes)
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            if "o_proj" not in name:
                linear.write_pruned(linear.weight * parse("2:4").keep(linear.weight.abs()))
    return model


def test_which_linears_are_two_of_four():
    """All that were pruned so and whose sides are multiples of 32 and 64; not the others, nor the head."""
    model = pruned()
    expected = {n for block in find_blocks(model) for n in block.linears if "o_proj" not in n}
    assert set(two_of_four(model)) == expected


def test_what_cannot_be(models, monkeypatch):
    """One sentence each: no CUDA, another device, full precision, nothing 2:4."""
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds none here"):
            sparsekit.load(models / "tiny-llama", sparse=True)
    with pytest.raises(ValueError, match="this model is on cpu"):
        sparsekit.load(models / "tiny-llama", sparse=True, device="cpu")
    model = pruned()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        make_semi_structured(model)
    dense = build("Llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match="no linear of the model is 2:4"):
        make_semi_structured(dense)


def test_a_device_is_a_place(models):
    assert sparsekit.load(models / "tiny-llama", device="cpu")[0].device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here: make test-gpu on a machine that has it")
def test_on_a_card():
    """The same logits in half precision, through semi-structured tensors."""
    model = pruned().to("cuda", torch.float16).eval()
    ids = torch.arange(5, 69, device="cuda")[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert make_semi_structured(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=2e-2, atol=2e-2)
