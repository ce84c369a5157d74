"""What is pruned, and what is cut alike in all layers, in clients that read a checkpoint with code of their own.

The base of rotary positions is no client's default: transformers 5 alone writes it where others do not look.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparsekit
from sparsekit.model import find_blocks, save_model
from sparsekit.model.structure import Removal, Shape, choose, find_units
from tests.clients.test_transformers import cut as unequal

TINY = Path(__file__).parents[1] / "models" / "tiny-llama"
CLIENTS = {
    "mlx-lm": ("by_mlx.py", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "ctranslate2": ("by_ctranslate2.py", ("ctranslate2==4.8.5", "transformers==4.57.6", "safetensors")),
    "onnxruntime-genai": (
        "by_genai.py",
        ("onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "transformers==5.23.0", "safetensors"),
    ),
    "optimum-intel": ("by_optimum.py", ("optimum-intel[openvino]==2.2.0", "-torchvision")),
    "transformers-4.57.6": ("by_transformers.py", ("transformers==4.57.6", "safetensors")),
    "transformers-4.48.3": ("by_transformers.py", ("transformers==4.48.3", "safetensors")),
}
FAMILIES = {
    "Llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}},
}


def model_of(family: str, **settings: Any) -> Any:
    """A small random model whose weights are large enough that positions matter."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "vocab_size": 768, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | FAMILIES[family] | settings, tie_word_embeddings=False)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def pruned(family: str, folder: Path, **settings: Any) -> Path:
    """2:4 by magnitude."""
    _, tokenizer = sparsekit.load(TINY)
    model = model_of(family, **settings)
    result = sparsekit.prune(
        model, tokenizer, pattern="2:4", stages=["magnitude"], calibration=["A list is a sequence. " * 20] * 4
    )
    return result.save(folder) / "model"


def cut(family: str, folder: Path, **settings: Any) -> Path:
    """As many channels fewer in each layer."""
    _, tokenizer = sparsekit.load(TINY)
    model = model_of(family, **settings)
    blocks = find_blocks(model)
    units = find_units(model, blocks, ["channels"])
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(1)).double()
    removal = Removal(units.kinds, choose(units, scores, 0.2, shape="uniform"))
    removal.apply(model, blocks)
    save_model(model, tokenizer, folder, Shape.of(model, [(units, removal)]))
    return folder


@pytest.mark.parametrize("made", [pruned, cut], ids=["2:4", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_computes_the_same(name: str, family: str, made: Any, client: Any, tmp_path: Path) -> None:
    script, packages = CLIENTS[name]
    folder = made(family, tmp_path / "result")
    model, _ = sparsekit.load(folder)
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=None)[0, -8:]
    found = client(name, *packages)(script, str(folder))
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-3, atol=1e-3)
    assert found["tokens"] == tokens.tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlx-lm", "not supported"),
        ("ctranslate2", "trust_remote_code|No conversion"),
        ("onnxruntime-genai", "trust_remote_code"),
        ("optimum-intel", "unsupported architecture|custom"),
    ],
)
def test_unequal_layers_are_no_silent_mistake(name: str, said: str, client: Any, tmp_path: Path) -> None:
    """A client that cannot read them says so, and computes nothing."""
    script, packages = CLIENTS[name]
    with pytest.raises(AssertionError, match=said):
        client(name, *packages)(script, str(unequal(tmp_path / "model")))
