"""What walks need in memory at the sizes of LLaMA, by the formulas that a run follows: `python -m benchmarks.scale`.

Models are built on the meta device from their shapes alone; nothing is read. docs/scale.md has what was measured.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.model import discover
from sparsekit.recipe import load_recipe
from sparsekit.run import memory_needs

SHAPES = {  # width, inner, blocks, heads, key and value heads, vocabulary
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B (Llama 3)": (4096, 14336, 32, 32, 8, 128256),
    "70B (Llama 3)": (8192, 28672, 80, 64, 8, 128256),
    "405B (Llama 3)": (16384, 53248, 126, 128, 8, 128256),
}
STAGES = ("wanda", "sparsegpt", "alps", "fista", "lamp")


def main() -> None:
    """Print a table in Markdown."""
    print("| | weights | one block | " + " | ".join(STAGES) + " | activations, 128 x 2048 |")
    print("|---|" + "---|" * (len(STAGES) + 3))
    for name, (width, inner, count, heads, kv, vocabulary) in SHAPES.items():
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=count,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocabulary,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        blocks = discover(model, torch.zeros(1, 8, dtype=torch.long, device="meta"))
        block = sum(parameter.numel() for parameter in blocks[0].module.parameters())
        whole = sum(parameter.numel() for parameter in model.parameters())
        cells = [f"{2 * whole / 1e9:.0f} GB", f"{2 * block / 1e9:.2f} GB"]
        for stage in STAGES:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "recipe.yaml"
                chain = ["wanda", stage] if stage == "fista" else [stage]
                settings = {"model": "x", "pattern": "2:4", "stages": chain, "calibration": {"source": "python-docs"}}
                file.write_text(json.dumps(settings))
                recipe = load_recipe(file)
            (parts,) = memory_needs(recipe, [recipe.stages], blocks, torch.bfloat16).values()
            cells.append(f"{sum(parts.values()) / 1e9:.1f} GB")
        cells.append(f"{128 * 2048 * width * 2 / 1e9:.1f} GB")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
