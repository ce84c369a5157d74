"""Blocks that stay on disk until their turn comes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsekit.model import (
    Checkpoint,
    Weights,
    filled,
    filled_in_turn,
    find_blocks,
    joined,
    load,
    load_resting,
    rests,
    settle,
    split_experts,
    unsettle,
)
from sparsekit.recipe import load_recipe
from sparsekit.run import run_recipe
from sparsekit.walk import Walk

# tied embeddings, transposed weights, experts one by one on disk, experts fused on disk, other names, a state space
NAMES = ("llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "gemma3_text", "bloom", "llama4_text", "mamba2")
Tiny = Callable[[str], Path]
TEXT = torch.arange(5, 21)[None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_filled_in_turn_it_is_the_model_that_transformers_loads(tiny: Tiny, name: str, dtype: str | None) -> None:
    whole = load(tiny(name), dtype=dtype)[0]
    model = load_resting(tiny(name), dtype=dtype)
    blocks = find_blocks(model)
    assert all(rests(block) for block in blocks)
    assert not any(p.is_meta for n, p in model.named_parameters() if not n.startswith(tuple(b.name for b in blocks)))
    split_experts(whole)
    with filled_in_turn(blocks):
        assert torch.equal(model(input_ids=TEXT).logits, whole(input_ids=TEXT).logits)
    assert all(rests(block) for block in blocks)
    with filled(blocks), joined(model), joined(whole):
        mine, theirs = model.state_dict(), whole.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in theirs)
        assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in whole.named_buffers()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_was_not_written_is_as_it_was(tiny: Tiny, name: str) -> None:
    model = load_resting(tiny(name))
    block = find_blocks(model)[1]
    linear = next(reversed(block.linears.values()))
    with filled([block]):
        before = linear.weight.clone()
        linear.write(torch.zeros_like(before))
    with filled([block]):
        assert torch.equal(linear.weight, before)
        assert before.count_nonzero()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_block_is_filled_from_where_it_was_written(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = load_resting(tiny(name))
    blocks = find_blocks(model)
    weights = Weights(tmp_path / "weights", model)
    weights.lay_out(block.name for block in blocks)
    block = blocks[0]
    linear = next(iter(block.linears.values()))
    with filled([block]):
        linear.write(torch.full_like(linear.weight, 0.25))
        weights.write(block)
        settle(block, weights.stored)
        assert rests(block)
    with filled([block]):
        assert bool((linear.weight == 0.25).all())
    unsettle(blocks)
    assert not any(rests(each) for each in blocks)
    with filled([block]):  # nothing to do
        pass
    assert bool((linear.weight == 0.25).all())


def test_a_lost_tensor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny("llama")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of LlamaForCausalLM, the first is model.layers.1.mlp.down"):
        load_resting(tmp_path)
    with pytest.raises(KeyError):
        Checkpoint(tmp_path).tensors(["nothing"])


@pytest.mark.parametrize(
    ("stages", "correction"),
    [(["wanda", {"fista": {"iterations": 2}}], "prefix"), (["wanda"], "model"), ([{"lamp": {"epochs": 1}}], "prefix")],
)
def test_a_walk_holds_one_block(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[object], correction: str
) -> None:
    seen: list[int] = []
    step = Walk.training_step

    def spy(walk: Walk, block: object, index: int) -> torch.Tensor:
        seen.append(sum(not rests(each) for each in walk.stream.blocks))
        return step(walk, block, index)  # type: ignore[arg-type]

    monkeypatch.setattr(Walk, "training_step", spy)
    recipe = tmp_path / "recipe.yaml"
    source = tiny("llama")
    recipe.write_text(
        f"model: {source}\npattern: '2:4'\nstages: {stages}\nerror_correction: {correction}\n"
        "calibration: {source: python-docs, samples: 4, length: 32}\nevaluate: {samples: false}\nbos: published\n"
        f"output: {tmp_path / 'run'}\n"
    )
    assert run_recipe(load_recipe(recipe)) == 0
    assert seen == [1] * len(find_blocks(load_resting(source)))
