"""What older readers look for in a checkpoint is there, and transformers reads the same as without it."""

import json

import pytest
import transformers
from test_run import TINY

import sparsekit
from sparsekit.model import save_model
from sparsekit.model.older import tell_older_readers

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("family", "settings", "place", "told"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}, (), {"rope_theta": 123.0}),
        (
            "Llama",
            {"rope_parameters": LLAMA3},
            (),
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        ("Gemma3Text", {}, (), {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("Gemma3", {}, ("text_config",), {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("GPTNeoX", {}, (), {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
        ("Phi", {}, (), {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("Qwen2_5_VL", {}, ("text_config",), {"rope_theta": 1e6}),
        ("OPT", {}, (), {}),
        ("ModernBert", {}, (), {}),  # it would read them otherwise
    ],
)
def test_rotary_positions_are_told_as_before_transformers_5(family, settings, place, told, tmp_path):
    config = getattr(transformers, f"{family}Config")(**settings)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    tell_older_readers(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_dict() == read
    for key in place:
        before, after = before[key], after[key]
    assert {
        key: value for key, value in after.items() if before.get(key) != value and key not in ("vision_config",)
    } == told


def test_what_is_there_already_stays(tmp_path):
    """A setting under the old name is not written over, and a config of a type that nobody knows is left alone."""
    told = {"model_type": "llama", "rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    for config in (told, {"model_type": "sparsekit_llama", "rope_parameters": {"rope_theta": 7.0}}):
        text = json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        tell_older_readers(tmp_path)
        assert (tmp_path / "config.json").read_text() == text


def test_a_tokenizer_says_a_class_that_all_know(tmp_path):
    model, tokenizer = sparsekit.load(TINY)
    save_model(model, tokenizer, tmp_path / "model")
    told = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast" and told.get("extra_special_tokens") != []
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "A list is a sequence; naïve <s> text."
    assert again(text).input_ids == tokenizer(text).input_ids and again.all_special_ids == tokenizer.all_special_ids
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 10000.0
