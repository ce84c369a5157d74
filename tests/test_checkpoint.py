"""What a checkpoint is: the files that transformers reads, and its tensors by the names that its model has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import SETTINGS, build
from safetensors.torch import load_file, save_file

from sparsekit.model import Checkpoint, opened, split_experts

TINY = Path(__file__).parent / "models" / "tiny-llama"
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "pad_token_id": 0}
SPARSE = WIDE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16}
MORE = {
    "Qwen3Moe": SPARSE | {"num_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": SPARSE | {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": SPARSE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": SPARSE
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", [*SETTINGS, *MORE])
def test_it_gives_what_from_pretrained_gives(family, bare, tmp_path):
    """By name and value; also of a bare model, which is opened as what it is."""
    torch.manual_seed(0)
    if family in MORE:
        config = getattr(transformers, f"{family}Config")(**MORE[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    else:
        model = build(family)
    (model.base_model if bare else model).save_pretrained(tmp_path, max_shard_size="60KB")
    auto = transformers.AutoModel if bare else transformers.AutoModelForCausalLM  # as its config's `architectures` say
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert len(Checkpoint(tmp_path).files) > 1
    split_experts(loaded)
    found, state = opened(tmp_path), loaded.state_dict()
    assert not found.unused and not found.doubled and set(found.missing) == set(info["missing_keys"])
    tied = dict(loaded.all_tied_weights_keys)
    assert set(found) | set(tied) | set(found.missing) == set(state)
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]) and found.shape(name) == tuple(state[name].shape), name


def test_a_vision_model_has_other_names_on_disk():
    folder = TINY.with_name("tiny-vit")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    found = opened(folder)
    assert set(found) == set(model.state_dict()) != set(found.stored)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = opened(folder)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in found.items())
    assert found.stored.unread == ["other.safetensors"]
    (folder / "model.safetensors").unlink()
    found = opened(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in found.items())


def test_files_that_config_names(tmp_path):
    folder = copied(tmp_path)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "mine.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(folder).stored.files == [folder / "mine.safetensors"]


def test_what_is_stored_and_nothing_of_the_model(tmp_path):
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"tower.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    assert opened(folder).unused == ["tower.weight"]
    first = min(name for name in tensors if name.startswith("model."))
    twice = tensors | {first.removeprefix("model."): tensors[first].clone()}
    save_file(twice, folder / "model.safetensors", {"format": "pt"})
    assert opened(folder).doubled == [first]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[1]", "holds a list, must be a mapping"),
        ("config.json", '{"transformers_weights": "../x.safetensors"}', "must be files of the folder itself"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": 1000000}', "num_hidden_layers: 1000000, and"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": "4"}', "num_hidden_layers: '4'"),
        ("config.json", '{"model_type": "llama", "hidden_size": 0}', "that transformers can build"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "that transformers can build"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', "that transformers can build"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/x.safetensors"}}', "must be files of the folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "must be files of the folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "which is not there"),
        ("model.safetensors.index.json", "{}", "its weight_map must give the file of every tensor"),
        ("model.safetensors.index.json", "nonsense", "cannot be read as JSON"),
    ],
)
def test_damages_are_told_in_one_sentence(file, text, said, tmp_path):
    folder = copied(tmp_path)
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match="") as told:
        opened(folder)
    assert said in str(told.value) and "\n" not in str(told.value)
