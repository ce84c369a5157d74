import pytest
import torch
import transformers
from families import GROUPS, SETTINGS, build
from torch import nn

from sparsekit.model import Linear, discover, find_blocks, first_inputs
from sparsekit.system import ActivationStore

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


GEMMA3N = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_kv_shared_layers": 3,  # these read keys and values of earlier layers
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("budget", [10**9, 1])
def test_what_depends_on_the_text_is_carried_from_block_to_block(budget):
    """Per-layer inputs, and keys and values that later blocks read; two stores do not see each other's."""
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**GEMMA3N)).eval()
    tokens = torch.randint(1, 96, (5, 12), generator=torch.Generator().manual_seed(2))
    blocks = discover(model, tokens[:1])
    stores = [ActivationStore(budget) for _ in range(2)]
    for hidden in first_inputs(model, blocks, tokens, batch=2):
        for store in stores:
            store.append(hidden)
    seen = []
    for start in range(0, 5, 2):
        hooks = [b.module.register_forward_hook(lambda _, a, out: seen.append(out.detach())) for b in blocks]
        with torch.no_grad():
            model(input_ids=tokens[start : start + 2], use_cache=False)
        for hook in hooks:
            hook.remove()
    for block in blocks:
        for index, chunk in enumerate(stores[1]):  # other hidden states, whose keys must not be found by the first
            stores[1][index] = block(_moved(chunk))
        for index, chunk in enumerate(stores[0]):
            stores[0][index] = block(chunk)
            expected = seen[index * len(blocks) + block.index]
            torch.testing.assert_close(stores[0][index], expected, rtol=1e-5, atol=1e-5)


def _moved(chunk: torch.Tensor) -> torch.Tensor:
    other = chunk + 1.0
    other.place = chunk.place
    return other


def test_linear_names():
    linear = Linear("a", nn.Linear(3, 5))
    assert linear.shape == (5, 3) and not linear.transposed
