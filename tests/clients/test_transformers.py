"""The modeling file of a cut model on the transformers that people have: the oldest that it is for, and others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparsekit
from sparsekit.model import find_blocks, save_model
from sparsekit.model.structure import Removal, Shape, choose, find_units

TINY = Path(__file__).parents[1] / "models" / "tiny-llama"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


WHOLE = (("attention", 1), ("mlp", 2))


def cut(folder: Path, family: str = "", gone: tuple[tuple[str, int], ...] = WHOLE, **settings: Any) -> Path:
    """A model with layers of unequal widths. gone: whole attentions and MLPs, by the number of their layer"""
    model, tokenizer = sparsekit.load(TINY)
    if family:
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 96, "vocab_size": 768, "max_position_embeddings": 256}
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes | settings)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for kinds in (["heads", "channels"], ["attention", "mlp"]):
        blocks = find_blocks(model)
        units = find_units(model, blocks, kinds)
        scores = torch.rand(len(units), generator=torch.Generator().manual_seed(1)).double()
        if kinds == ["heads", "channels"]:
            kept = choose(units, scores, 0.3, shape="free")
            first = (units, Removal(units.kinds, kept))
            first[1].apply(model, blocks)
        else:
            kept = torch.tensor([(part.kind, part.block) not in gone for part in units.parts])
            second = (units, Removal(units.kinds, kept))
            second[1].apply(model, blocks)
    save_model(model, tokenizer, folder, Shape.of(model, [first, second]))
    return folder


@pytest.mark.parametrize("version", ["4.48.3", "4.57.6", "5.5.4"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("", {}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Qwen2", {"rope_parameters": LLAMA3 | {"rope_type": "default"}}),
    ],
    ids=["trained", "llama3", "qwen2"],
)
def test_unequal_layers_are_the_same_in_older_transformers(
    version: str, family: str, settings: dict[str, Any], client: Any, tmp_path: Path
) -> None:
    folder = cut(tmp_path / "model", family, **settings)
    model, _ = sparsekit.load(folder)
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, -8:]
    found = client(f"transformers-{version}", f"transformers=={version}", "safetensors")(
        "by_transformers.py", str(folder)
    )
    assert found["version"] == version
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)
    assert found["tokens"] == tokens.tolist()
