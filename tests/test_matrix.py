"""Families of transformers through every kind of stage: a few always, all of them as a long test."""

import shutil
from pathlib import Path

import pytest
import torch

from sparsekit.model import discover, first_inputs, split_experts
from sparsekit.model.structure import Removal, Shape, find_units, masking
from sparsekit.model.structure.cutting import cut
from sparsekit.run.ahead import try_without
from sparsekit.system import ActivationStore
from sparsekit.walk import BlockStream
from tests.matrix import families, save, towers
from tests.matrix.__main__ import RECIPES, cell

FEW = {
    "qwen3_moe": ("sparsegpt", "reap"),
    "gpt_oss": ("sparsegpt", "lora"),
    "gemma3n_text": ("sparsegpt",),
    "falcon_h1": ("sparsegpt", "layers"),
    "deepseek_v3": ("lamp", "layers"),
    "jetmoe": ("sparsegpt",),
    "gpt_neo": ("wanda-sp",),
    "glm4": ("channels",),  # gate and up in one linear
    "zaya": ("lamp",),  # a linear that runs twice
}
RIGHT = {"works", "own", "refused"}


def outcome(family: str, recipe: str, home: Path, source: Path) -> dict:
    found = cell(family, source, recipe, home)
    assert found["cell"] in RIGHT, found
    assert found.get("share", 1.0) > (0.95 if family == "zaya" else 0.97), found  # its convolutions are left
    return found


@pytest.fixture
def source(request, tmp_path):
    folder = tmp_path / "source"
    try:
        families.save(request.param, folder)
    except Exception as error:
        pytest.skip(f"no tiny model of {request.param}: {error}")
    return folder


@pytest.mark.parametrize(("source", "family"), [(name, name) for name in FEW], indirect=["source"])
def test_a_few_families(source, family, tmp_path):
    for recipe in FEW[family]:
        assert outcome(family, recipe, tmp_path, source)["cell"] == "works"


@pytest.mark.parametrize("mode", ["prefix", "none", "block"])
def test_a_linear_that_runs_twice_is_solved_for_both_inputs(mode):
    """Zaya's values of the token before: the Gram matrix is that of all that enters, against float64."""
    model = families.build("zaya")
    split_experts(model)
    ids = torch.randint(1, 700, (3, 16), generator=torch.Generator().manual_seed(1))
    blocks = discover(model, ids[:1])
    [name] = blocks[0].calls
    entered: list[torch.Tensor] = []
    linear = blocks[0].linears[name].module
    store = ActivationStore(10**9)
    for hidden in first_inputs(model, blocks, ids, batch=3):
        store.append(hidden)
    stream = BlockStream(blocks, store, error_correction=mode)
    for names, stats in stream.statistics(blocks[0]):
        if names == [name]:
            found = stats
    hook = linear.register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    assert len(entered) == 2 and not torch.equal(*entered)
    rows = torch.cat(entered)
    gram = rows.t() @ rows
    assert (found.gram.double() - gram).norm() < 1e-6 * gram.norm()


@pytest.mark.long
@pytest.mark.parametrize(("source", "family"), [(name, name) for name in families.names()], indirect=["source"])
def test_every_family(source, family, tmp_path):
    for recipe in RECIPES:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        outcome(family, recipe, tmp_path, source)


@pytest.mark.parametrize(
    "name", ["image-text/gemma3", "image-text/qwen3_vl_moe", "masked/modernbert", "images/siglip", "two/umt5"]
)
def test_a_few_towers(name, tmp_path):
    task, _, kind = name.partition("/")
    towers.save(task, kind, tmp_path / "source")
    found = cell(name, tmp_path / "source", "sparsegpt", tmp_path)
    assert found["cell"] == "works" and found["share"] > 0.97, found


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("image-text/llava", "wanda-sp"),
        ("image-text/qwen3_vl", "layers"),
        ("lfm2", "wanda-sp"),
        pytest.param("image-text/llava", "layers", marks=pytest.mark.long),
        pytest.param("image-text/qwen3_vl", "wanda-sp", marks=pytest.mark.long),
    ],
)
def test_structures_of_the_text_part(name, recipe, tmp_path):
    """Of models of text and images, too; LFM2's linears have names of their own."""
    save(name, tmp_path / "source")
    found = cell(name, tmp_path / "source", recipe, tmp_path)
    assert found["cell"] in ("works", "own"), found


@pytest.mark.long
@pytest.mark.parametrize("task", towers.TASKS)
def test_every_tower(task, tmp_path):
    for kind in towers.names(task):
        home = tmp_path / kind
        home.mkdir()
        try:
            towers.save(task, kind, home / "source")
        except Exception:  # no tiny model can be built of it
            continue
        found = cell(f"{task}/{kind}", home / "source", "sparsegpt", home)
        assert found["cell"] in RIGHT, (kind, found)
        shutil.rmtree(home)


def cut_is_masked(family: str, kind: str, whole: bool) -> None:
    """What is left computes what the masked model did, and can be built again from its config and its counts.

    whole: every second part goes whole; otherwise one unit of each
    """
    ids = torch.randint(1, 700, (2, 16), generator=torch.Generator().manual_seed(1))
    model = families.build(family)
    split_experts(model)
    blocks = discover(model, ids[:1])
    units = find_units(model, blocks, [kind])
    kept = torch.ones(len(units), dtype=torch.bool)
    for number, each in enumerate(units.split(kept)):
        if whole and number % 2:
            each[:] = False
        elif len(each) > 1:
            each[len(each) // 2] = False
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with masking(blocks, units) as mask:
            mask(kept)
            masked = model(input_ids=ids).logits
        cut(model, blocks, units, kept)
        torch.testing.assert_close(model(input_ids=ids).logits, masked, rtol=1e-4, atol=1e-5)
    assert (masked - dense).abs().max() > 1e-3
    Shape.of(model, [(units, Removal(units.kinds, kept))])


@pytest.mark.parametrize("family", ["phi3", "glm4", "gptj", "codegen"])
def test_channels_of_linears_with_other_names(family):
    """Gate and up one after another in one linear; GPT-J's own names."""
    cut_is_masked(family, "channels", whole=False)


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",  # made of what is stored of a token
        "minicpm3",
        "hy_v4",  # the same, with gates and sinks
        "gpt_oss",  # sinks
        "afmoe",  # gates
        "phi3",  # q, k and v one after another, fewer keys than queries
        "falcon",  # one key for all, fused
        "gpt_bigcode",
        "modernbert-decoder",
        "xglm",
        "kimi_linear",  # other blocks attend by a recurrence
    ],
)
def test_heads_of_other_attentions(family):
    cut_is_masked(family, "heads", whole=False)


@pytest.mark.parametrize(("family", "kind"), [("gpt_neo", "heads"), ("bloom", "channels"), ("mpt", "channels")])
def test_whole_parts_of_other_families(family, kind):
    """BLOOM and MPT add to the residual stream inside their MLPs."""
    cut_is_masked(family, kind, whole=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["heads", "channels", "mamba"])
@pytest.mark.parametrize("family", families.names())
def test_the_cut_model_is_the_masked_one(family, kind):
    """Whatever is not refused in advance."""
    try:
        model = families.build(family)
        split_experts(model)
    except Exception as reason:  # of the family's own config
        pytest.skip(f"no tiny model: {reason}")
    try:
        try_without(model, discover(model, torch.arange(5, 13)[None]), kind)
    except ValueError as reason:
        pytest.skip(f"refused: {reason}")
    cut_is_masked(family, kind, whole=False)


@pytest.mark.parametrize("family", ["bloom", "doge"])
def test_heads_that_something_else_counts_are_refused_in_advance(family, tmp_path):
    """Slopes of ALiBi and gates over time belong to heads too: said before anything is scored."""
    families.save(family, tmp_path / "source")
    found = cell(family, tmp_path / "source", "wanda-sp", tmp_path)
    assert found["cell"] == "refused"
    assert "does not run without some of its heads" in found["why"]


def test_a_mixture_of_experts_has_heads_to_give():
    """Wanda-sp's channels are not there: the sentence says what is."""
    model = families.build("mixtral")
    split_experts(model)
    blocks = discover(model, torch.arange(5, 13)[None])
    with pytest.raises(
        ValueError, match=r"no MLP whose linears sparsekit knows.*its heads can go alone: give `units: h"
    ):
        find_units(model, blocks, ["heads", "channels"])
    assert find_units(model, blocks, ["heads"]).kinds == ["heads"]
