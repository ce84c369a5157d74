"""Weights that are written block by block: the same bytes as `save_pretrained` of transformers, and nothing else."""

import json
import os
from pathlib import Path

import pytest
import torch
from families import SETTINGS, build
from safetensors.torch import load_file

from sparsekit.model import Weights, find_blocks
from sparsekit.model.shards import Shards


@pytest.mark.parametrize("family", sorted(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_are_those_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied embeddings, fused experts that files hold one by one, buffers: whatever order blocks come in."""
    model = build(family).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    blocks, weights = find_blocks(model), Weights(tmp_path / "ours", model)
    told = [weights.lay_out(block.name for block in blocks)]
    told += [weights.write(block) for block in reversed(blocks)]
    theirs, ours = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("theirs", "ours"))
    theirs.pop("generation_config.json")  # the source's own is put there at the end
    ours.pop("generation_config.json")
    assert ours == theirs
    again = Weights(tmp_path / "ours", model)
    assert all(again.intact(each) for each in told)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in blocks:
        with torch.no_grad():
            for tensor in block.module.state_dict().values():
                tensor.zero_()
        again.read(block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_several_files_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.model.shards.SHARD", "20KB")
    model = build("Llama")
    blocks, weights = find_blocks(model), Weights(tmp_path, model)
    weights.lay_out(block.name for block in blocks)
    for block in blocks:
        weights.write(block)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {name for file in files for name in load_file(file)} == set(index["weight_map"])
    loaded = type(model).from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_changed_bit_is_seen(tmp_path: Path) -> None:
    model = build("Llama")
    blocks, weights = find_blocks(model), Weights(tmp_path, model)
    outside = weights.lay_out(block.name for block in blocks)
    told = [weights.write(block) for block in blocks]
    place = Shards(tmp_path).places[told[1]["names"][0]]
    content = bytearray(place.file.read_bytes())
    content[place.start + place.size - 1] ^= 1
    place.file.write_bytes(content)
    again = Weights(tmp_path, model)
    assert [again.intact(each) for each in told] == [True, False, True] and again.intact(outside)
    place.file.unlink()
    assert not Weights(tmp_path, model).intact(outside)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot take room in advance")
def test_a_full_disk_is_known_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = build("Llama")
    with pytest.raises(OSError, match="No space left"):
        Weights(tmp_path, model).lay_out([])


def test_a_tensor_of_another_shape_has_no_place(tmp_path: Path) -> None:
    shards = Shards.lay_out(tmp_path, {"a": torch.empty(2, 3, device="meta"), "b": torch.empty((), device="meta")})
    with pytest.raises(ValueError, match=r"no place for a \(2, 2\)"):
        shards.write({"a": torch.ones(2, 2)})
    shards.write({"a": torch.ones(2, 3), "b": torch.tensor(5.0)})
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], torch.ones(2, 3)) and found["b"] == 5
