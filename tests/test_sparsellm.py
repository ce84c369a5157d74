"""SparseLLM as a stage: parts are found by what they do, and it is worth it on trained models."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from families import GROUPED, build, committing
from lightning.pytorch import Trainer

from sparsekit.data import sample, windows
from sparsekit.data.corpora import python_docs
from sparsekit.maths import parse
from sparsekit.measure import perplexity
from sparsekit.model import discover, load_plain, load_tokenizer
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.stages.sparsellm import find_part, sparsellm
from sparsekit.testing import begin, context
from sparsekit.walk import BlockStream, Commit, OneShot, Walk

FUSED = {
    "Phi3": GROUPED | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "Glm": GROUPED | {"head_dim": 8, "attention_bias": False},
}
TOKENS = torch.randint(1, 96, (6, 24), generator=torch.Generator().manual_seed(1))


def work(model, tokens, pattern, mode="prefix", commits=None):
    """A context around a model in memory."""
    more = {} if commits is None else {"commits": commits}
    return context(model, tokens, Path(), pattern=pattern, batch=2, index=1, error_correction=mode, **more)


def fit(walk, stream, callbacks, stop_after=None):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        max_steps=stop_after or -1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(walk, stream)
    return stream.blocks


def joint(model, tokens=TOKENS, pattern="2:4", mode="prefix", commits=None, stop_after=None, **options):
    walk, stream, callbacks = sparsellm(work(model, tokens, pattern, mode, commits), **options)
    return fit(walk, stream, callbacks + ([Commit(commits)] if commits else []), stop_after)


def local(model, tokens=TOKENS, pattern="2:4", solver=sparsegpt):
    here = work(model, tokens, pattern)
    stream = here.stream()
    return fit(Walk(stream), stream, [OneShot(solver, here.patterns)])


def first_block(family, dtype=torch.float32, settings=None):
    model = build(family, settings=settings or FUSED.get(family)).to(dtype)
    blocks = discover(model, TOKENS[:1, :8])
    return blocks[0], BlockStream.over(model, blocks, TOKENS, batch=2).inputs[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "activation", "roles"),
    [
        ("Llama", "silu", ["gate_proj", "up_proj", "down_proj"]),
        ("Qwen3", "silu", ["gate_proj", "up_proj", "down_proj"]),
        ("Gemma", "gelu_tanh", ["gate_proj", "up_proj", "down_proj"]),
        ("OPT", "relu", ["fc1", "fc2"]),
        ("GPT2", "gelu_tanh", ["c_fc", "c_proj"]),
        ("GPTNeoX", "gelu", ["dense_h_to_4h", "dense_4h_to_h"]),
        ("Phi3", "silu", ["gate_up_proj", "gate_up_proj", "down_proj"]),  # halves of one linear
        ("Glm", "silu", ["gate_up_proj", "gate_up_proj", "down_proj"]),
        ("Phi", "gelu_tanh", ["fc1", "fc2"]),  # in parallel to the attention, whose q, k and v read the same
    ],
)
def test_parts_are_found_by_what_they_do(family, activation, roles, dtype):
    block, hidden = first_block(family, dtype)
    found, names = find_part(block, hidden)
    order = [role for role in ("gate", "up", "down") if role in names]
    assert [names[role][0].rsplit(".", 1)[1] for role in order] == roles
    assert found == activation or (dtype == torch.bfloat16 and {found, activation} == {"gelu", "gelu_tanh"})


@pytest.mark.parametrize("family", ["Mixtral"])
def test_other_blocks_are_left_to_the_solver_with_a_warning(family):
    assert find_part(*first_block(family)) is None
    model = build(family)
    alone = copy.deepcopy(model)
    blocks = joint(model)
    local(alone)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))
    said = [warning for record in blocks[0].records.values() for warning in record["warnings"]]
    assert any("has no feed-forward part that sparsellm knows" in warning for warning in said)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_halves_of_one_linear_are_pruned_as_two_linears(pattern):
    """The same weights, fused as Phi-3 has them, and apart as LLaMA has them, give the same answers."""
    fused, apart = (build(family, settings=FUSED["Phi3"]) for family in ("Phi3", "Llama"))
    tensors = fused.state_dict()
    for name in list(tensors):
        if "qkv_proj" in name:
            for letter, rows in zip("qkv", tensors.pop(name).split([32, 16, 16]), strict=True):
                tensors[name.replace("qkv", letter)] = rows
        elif "gate_up_proj" in name:
            for half, rows in zip(("gate", "up"), tensors.pop(name).chunk(2), strict=True):
                tensors[name.replace("gate_up", half)] = rows
    apart.load_state_dict(tensors)
    torch.testing.assert_close(fused(TOKENS).logits, apart(TOKENS).logits)
    options = {"epochs": 2, "solver": {"sparsegpt": {"block": 8}}}
    for one, two in zip(
        joint(fused, pattern=pattern, **options), joint(apart, pattern=pattern, **options), strict=True
    ):
        assert one.notes["sparsellm"]["activation"] == "silu"
        gate_up = one.linears[f"{one.name}.mlp.gate_up_proj"].weight
        both = torch.cat([two.linears[f"{two.name}.mlp.{half}_proj"].weight for half in ("gate", "up")])
        if pattern == "2:4":  # attention's rows do not compete then, so that inputs are the same
            torch.testing.assert_close(gate_up, both, rtol=1e-3, atol=1e-5)
        assert abs(float((gate_up == 0).float().mean()) - 0.5) < 0.02


def test_the_error_of_down_is_that_of_the_part():
    """Against forward passes of the dense and the pruned feed-forward part on the same inputs."""
    model = build("Llama")
    dense = copy.deepcopy(model)
    blocks = joint(model, epochs=2)
    here = work(dense, TOKENS, "2:4")
    hidden = torch.cat([chunk.flatten(0, 1) for chunk in _normed(dense, here)])
    one, two = (m.model.layers[0].mlp(hidden) for m in (dense, model))
    expected = float((one - two).square().sum() / one.square().sum())
    assert blocks[0].records["model.layers.0.mlp.down_proj"]["error"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def _normed(model, here):
    """What enters the first feed-forward part of the dense model."""
    block, found = here.blocks[0], []
    group = next(i for i, names in enumerate(block.groups) if names[0].endswith("gate_proj"))
    for chunk in here.stream().inputs:
        block.until(chunk, [group], lambda _, inputs: found.append(inputs))
    return found


def test_what_a_block_remembers():
    model = build("Llama")
    blocks = joint(model, epochs=2)
    for block in blocks:
        assert block.records.keys() == block.masks.keys() == block.linears.keys()
        seen = block.notes["sparsellm"]
        assert seen["activation"] == "silu" and len(seen["errors"]) == 3 and len(seen["objectives"]) == 6
        assert seen["errors"][seen["epoch"]] == min(seen["errors"])
        for name, linear in block.linears.items():
            assert parse("2:4").satisfied(linear.weight)
            assert torch.equal(linear.weight != 0, block.masks[name])
            assert block.records[name]["zeros"] == int((linear.weight == 0).sum())
            assert block.records[name]["seconds"] > 0 and block.records[name]["pattern"] == "2:4"


def test_without_epochs_it_is_the_solver_alone():
    model = build("OPT")
    alone = copy.deepcopy(model)
    joint(model, epochs=0, settle=False, solver="wanda")
    local(alone, solver=wanda)
    for one, two in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


def test_first_half_only_leaves_the_rest_dense():
    model = build("GPT2")
    dense = copy.deepcopy(model)
    blocks = joint(model, first_half_only=True)
    names = dict(dense.named_modules())
    assert len(blocks) == 3
    for block in blocks[1:]:
        for name, linear in block.linears.items():
            assert torch.equal(linear.module.weight, names[name].weight)
            assert (
                block.records[name]["pattern"] == "0%" and block.records[name]["error"] == 0 and block.masks[name].all()
            )
    assert all(record["pattern"] == "2:4" for record in blocks[0].records.values())


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    model = build("Llama")
    whole = copy.deepcopy(model)
    joint(whole, epochs=1)
    other = copy.deepcopy(model)
    joint(other, commits=committing(tmp_path, other), stop_after=1, epochs=1)
    commits = committing(tmp_path, model)
    assert commits.done() == {0}
    blocks = joint(model, commits=commits, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    assert blocks[0].notes["sparsellm"]["activation"] == "silu"


@pytest.mark.parametrize("options", [{"alpha": 0}, {"beta": -1}, {"gamma": 0.0}, {"epochs": -1}, {"damping": -0.1}])
def test_wrong_options_are_refused(options):
    [(name, value)] = options.items()
    least = "above 0" if name in ("alpha", "beta", "gamma") else "at least 0"
    with pytest.raises(ValueError, match=f"option `{name}` is {value}, must be {least}"):
        begin(sparsellm, work(build("Llama"), TOKENS, "2:4"), **options)


def test_other_error_corrections_are_refused():
    with pytest.raises(ValueError, match="choose prefix or none"):
        sparsellm(work(build("Llama"), TOKENS, "2:4", "block"))
    joint(build("Llama"), mode="none", epochs=1)


@pytest.mark.parametrize("pattern", ["70%", "80%", "1:4"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_it_beats_the_solver_alone_on_text_it_has_not_seen(models, name, pattern):
    folder = models / name
    tokenizer = load_tokenizer(folder)
    tokens = sample(python_docs("calibration"), tokenizer, samples=8, length=128, seed=0)
    held_out = windows(python_docs("test"), tokenizer, 128)[:24]
    figures = []
    for prune in (local, partial(joint, epochs=2)):
        model, _ = load_plain(folder)
        blocks = prune(model, tokens, pattern)
        figures.append(perplexity(model, held_out, batch=8))
    for block in blocks:
        errors = block.notes["sparsellm"]["errors"]
        assert min(errors) <= errors[0]
    assert figures[1] < 0.95 * figures[0]
