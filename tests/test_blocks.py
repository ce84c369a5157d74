import pytest
import torch
from families import GROUPS, SETTINGS, build
from torch import nn

from sparsekit.model import Linear, discover, find_blocks, first_inputs

FAMILIES = sorted(SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_are_the_linears_that_read_the_same_tensor(family, device):
    model = build(family, device)
    if device == "meta":
        model.to(torch.bfloat16)  # grouped products of experts have no other form there
    blocks = discover(model, torch.zeros(1, 8, dtype=torch.long, device=device))
    assert len(blocks) == 3
    for block in blocks:
        assert [[name.split(".")[-1] for name in group] for group in block.groups] == GROUPS[family]
        assert not block.skipped


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_models_own_forward(family):
    model = build(family)
    tokens = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    blocks = discover(model, tokens[:1, :8])
    seen = []
    hook = blocks[-1].module.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    chunks = []
    for hidden in first_inputs(model, blocks, tokens, batch=2):  # batches of two and one
        for block in blocks:
            hidden = block(hidden)
        chunks.append(hidden)
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model.get_input_embeddings()(tokens)).abs().max() > 0.1  # the blocks do something


def test_conv1d_is_seen_as_out_by_in():
    model = build("GPT2")
    linear = find_blocks(model)[0].linears["transformer.h.0.mlp.c_fc"]
    assert linear.shape == (128, 32)
    linear.write_pruned(-torch.zeros(128, 32))
    assert not torch.signbit(linear.module.weight).any()
    assert linear.stored(linear.weight).shape == linear.module.weight.shape


def test_twin_has_its_own_weights():
    block = find_blocks(build("Llama"))[0]
    twin = block.twin()
    name = next(iter(block.linears))
    twin.linears[name].write(torch.zeros(twin.linears[name].shape))
    assert block.linears[name].weight.abs().sum() > 0
    assert twin.linears[name].weight.abs().sum() == 0


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no repeated blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_an_argument_that_changes_with_the_text_is_refused():
    model = build("Llama")
    tokens = torch.arange(16).reshape(2, 8)
    blocks = discover(model, tokens)
    inner = model.model.layers[1]
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, dict(kwargs, extra=args[0].clone())), with_kwargs=True
    )
    assert inner is blocks[1].module
    with pytest.raises(ValueError, match="changes with the text"):
        list(first_inputs(model, blocks, tokens, batch=1))


def test_linear_names():
    linear = Linear("a", nn.Linear(3, 5))
    assert linear.shape == (5, 3) and not linear.transposed
