"""Block reconstruction against least squares, and the promises that it makes of zeros, held-out error and dtypes."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build, committing
from torch import nn

from sparsekit.model import Block, discover, first_inputs
from sparsekit.system import ActivationStore
from sparsekit.train import channel_gradients, reconstruct

TOKENS = torch.randint(1, 96, (12, 16), generator=torch.Generator().manual_seed(1))


def pruned_block(family="Llama", dtype=torch.float32, loud=1.0):
    """The second block of a model with half of its weights removed, its inputs, and its dense outputs.

    loud: what its fourth input channel is multiplied by
    """
    model = build(family).to(dtype)
    blocks = discover(model, TOKENS[:1, :8])
    scale = torch.where(torch.arange(32) == 3, loud, 1.0).to(dtype)
    inputs = [chunk * scale for chunk in first_inputs(model, blocks, TOKENS, 2)]
    block = blocks[1]
    targets = [block(chunk) for chunk in inputs]
    masks = {}
    for index, (name, linear) in enumerate(block.linears.items()):
        masks[name] = torch.rand(linear.shape, generator=torch.Generator().manual_seed(index)) < 0.5
        linear.write_pruned(linear.weight * masks[name])
    return block, inputs, targets, masks


def error(block, inputs, targets, indices, per_token=True):
    pairs = [(block(inputs[i]).double(), targets[i].double()) for i in indices]
    squares = [(a - b).square() / (b.square().mean(-1, keepdim=True) if per_token else 1) for a, b in pairs]
    return sum(float(square.sum()) for square in squares)


def state(block):
    return {name: p.detach().clone() for name, p in block.module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("trainable", "per_token"), [*((each, True) for each in ("all", "low-rank", "norms-and-biases")), ("all", False)]
)
def test_zeros_stay_and_the_error_falls(trainable, per_token, dtype):
    block, inputs, targets, masks = pruned_block(dtype=dtype)
    before, start = error(block, inputs, targets, [5], per_token), state(block)
    options = {"trainable": trainable, "learning_rate": 3e-3, "weight_decay": 0.1, "rank": 4, "per_token": per_token}
    record = reconstruct(block, inputs, targets, masks=masks, **options)
    for name, linear in block.linears.items():
        assert not linear.weight[~masks[name]].view(torch.int8).any()  # no bit set: not even a sign
        assert linear.weight.dtype == dtype
    after = error(block, inputs, targets, [5], per_token)  # the last of six chunks is the one held out
    assert after < before * (0.99 if trainable == "all" else 1)
    assert record["after"] / record["before"] == pytest.approx(after / before, rel=1e-4)
    changed = {name for name, p in state(block).items() if not torch.equal(p, start[name])}
    assert changed == block.trained
    assert any("norm" in name for name in changed)
    assert any("proj" in name for name in changed) == (trainable != "norms-and-biases")


def test_another_optimizer_takes_other_steps():
    ends = {}
    for optimizer in ("adamw", "sgd"):
        block, inputs, targets, masks = pruned_block()
        record = reconstruct(block, inputs, targets, masks=masks, optimizer=optimizer, learning_rate=3e-3, epochs=3)
        assert record["after"] < record["before"]
        ends[optimizer] = record["after"]
    assert ends["adamw"] != ends["sgd"]


@pytest.mark.parametrize("learning_rate", [3.0, 1e30])
def test_no_learning_rate_can_make_it_worse(learning_rate):
    block, inputs, targets, masks = pruned_block()
    start = state(block)
    before = error(block, inputs, targets, [5])
    reconstruct(block, inputs, targets, masks=masks, learning_rate=learning_rate, epochs=2, warmup=0)
    assert error(block, inputs, targets, [5]) <= before
    assert all(p.isfinite().all() for p in state(block).values())
    if not block.trained:
        assert all(torch.equal(p, start[name]) for name, p in state(block).items())


def test_divergence_is_said(recwarn):
    block, inputs, targets, _ = pruned_block()
    record = reconstruct(block, inputs, targets, learning_rate=1e30, epochs=3, warmup=0)
    assert any("diverged in epoch 1" in str(w.message) for w in recwarn.list)
    assert record["best_epoch"] == 0 and record["after"] == record["before"] and not block.trained


def test_the_dense_block_cannot_be_bettered():
    """Nothing to gain: not a bit of the block changes."""
    block, inputs, _, _ = pruned_block()
    targets, start = [block(chunk) for chunk in inputs], state(block)
    record = reconstruct(block, inputs, targets, learning_rate=1e-3)
    assert record["before"] == record["after"] == 0 and record["best_epoch"] == 0
    assert all(torch.equal(p, start[name]) for name, p in state(block).items())


@pytest.mark.parametrize("trainable", ["all", "low-rank"])
def test_a_linear_block_reaches_least_squares_on_its_support(trainable):
    """A block that is one linear without bias: every row is a regression on its kept inputs, tokens weighed."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    mask = torch.rand(12, 12, generator=generator) < 0.6
    with torch.no_grad():
        module[0].weight.copy_(torch.randn(12, 12, generator=generator) * mask)
    block = Block(0, "layers.0", module)
    block.arguments = {2: ((), {})}
    inputs, targets = torch.randn(2, 8, 2, 8, 12, generator=generator, dtype=torch.float64)
    record = reconstruct(
        block,
        inputs,
        targets,
        masks={"layers.0.0": mask},
        trainable=trainable,
        rank=12,
        learning_rate=0.05,
        epochs=400,
        batch=8,
        held_out=0,
        patience=400,
    )
    x, y = inputs.view(-1, 12), targets.view(-1, 12)
    weights = y.square().mean(1, keepdim=True).rsqrt()  # (tokens, 1)
    best = torch.zeros_like(y)
    for row in range(12):
        support = mask[row]
        solution = torch.linalg.lstsq(weights * x[:, support], weights * y[:, row, None]).solution
        best[:, row : row + 1] = x[:, support] @ solution
    optimum = float((weights * (best - y)).square().mean())
    assert optimum * (1 - 1e-9) <= record["after"] <= optimum * (1 + 1e-6)
    assert record["after"] < 0.9 * record["before"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    ends = []
    for seed in (0, 0, 1):
        block, inputs, targets, masks = pruned_block()
        torch.manual_seed(len(ends))  # the global generator must not matter
        reconstruct(block, inputs, targets, masks=masks, trainable="low-rank", epochs=2, seed=seed)
        ends.append(state(block))
    same, other = ([torch.equal(ends[0][n], end[n]) for n in ends[0]] for end in ends[1:])
    assert all(same) and not all(other)


def test_chunks_on_disk_give_the_same_bits(tmp_path):
    ends = []
    for budget in (10**9, 0):
        block, inputs, targets, masks = pruned_block("OPT")
        stores = [ActivationStore(budget, tmp_path) for _ in range(2)]
        for store, chunks in zip(stores, (inputs, targets), strict=True):
            for chunk in chunks:
                store.append(chunk)
        reconstruct(block, *stores, masks=masks, epochs=2)
        ends.append(state(block))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


class Threads:
    """A team of two threads in place of two processes."""

    size, barrier, boxes = 2, threading.Barrier(2, timeout=60), {}

    def __init__(self, rank):
        self.rank = rank

    def sum(self, tensors):
        for tensor in tensors:
            self.boxes[self.rank] = tensor.clone()
            self.barrier.wait()
            total = self.boxes[0] + self.boxes[1]
            self.barrier.wait()
            tensor.copy_(total)


def test_two_processes_that_share_the_chunks_do_what_one_does():
    """Whole-batch steps, so that the order does not matter; the seventh chunk, which has no partner, is left out."""
    block, inputs, targets, masks = pruned_block()
    options = {"masks": masks, "epochs": 5, "held_out": 0, "learning_rate": 3e-3}
    members = [copy.deepcopy(block), copy.deepcopy(block)]
    shares = [(inputs[:3], targets[:3]), ([*inputs[3:], inputs[0]], [*targets[3:], targets[1]])]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(reconstruct, member, *share, batch=3, team=Threads(rank), **options)
            for rank, (member, share) in enumerate(zip(members, shares, strict=True))
        ]
        records = [run.result() for run in runs]
    alone = reconstruct(block, inputs, targets, batch=6, **options)
    for name, p in state(block).items():
        assert torch.equal(state(members[0])[name], state(members[1])[name])
        torch.testing.assert_close(state(members[0])[name], p, rtol=1e-3, atol=1e-4)
    assert records[0]["held_out"] == records[1]["held_out"]
    assert records[0]["after"] / records[0]["before"] == pytest.approx(alone["after"] / alone["before"], rel=1e-3)
    assert alone["after"] < 0.9 * alone["before"]


@pytest.mark.parametrize("family", ["GPT2", "Gemma3", "GPTNeoX", "Mixtral"])
def test_families(family, tmp_path):
    """Transposed linears, several norms, parallel branches, fused experts; and a commit holds all that changed."""
    block, inputs, targets, masks = pruned_block(family)
    fresh = copy.deepcopy(block)
    record = reconstruct(block, inputs, targets, masks=masks, learning_rate=3e-3, epochs=4)
    assert record["after"] < record["before"]
    for name, linear in block.linears.items():
        assert not linear.weight[~masks[name]].any()
    commits = committing(tmp_path, build(family))
    block.masks, block.notes = masks, {"seen": record}
    commits.commit(block)
    commits.restore(fresh)
    assert fresh.trained == block.trained and fresh.notes == block.notes
    assert all(torch.equal(p, state(fresh)[name]) for name, p in state(block).items())


def test_the_module_is_left_as_it_was():
    block, inputs, targets, masks = pruned_block()
    parameters = dict(block.module.named_parameters())
    block.module.train()
    reconstruct(block, inputs, targets, masks=masks, epochs=1)
    assert block.module.training
    assert all(p is parameters[name] and p.grad is None for name, p in block.module.named_parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trainable": "lora"}, 'trainable is "lora", must be "all" or "low-rank" or "norms-and-biases"'),
        ({"epochs": -1}, "epochs is -1, must be at least 0"),
        ({"batch": 0}, "batch is 0"),
        ({"optimizer": "adam"}, 'optimizer is "adam", must be "adamw" or "sgd"'),
        ({"held_out": 1.0}, "held_out is 1.0, must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        (
            {"masks": {"model.layers.7.q": torch.ones(1)}},
            r"model\.layers\.7\.q, which is no linear of model\.layers\.1",
        ),
    ],
)
def test_options_are_checked(options, said):
    block, inputs, targets, _ = pruned_block()
    with pytest.raises(ValueError, match=said):
        reconstruct(block, inputs, targets, **options)


def test_chunks_are_checked():
    block, inputs, targets, masks = pruned_block()
    with pytest.raises(ValueError, match="0 chunk of activations; reconstruction needs at least 2"):
        reconstruct(block, [], [])
    with pytest.raises(ValueError, match="6 chunks of inputs and 5 of targets"):
        reconstruct(block, inputs, targets[:5])
    with pytest.raises(ValueError, match=r"chunk 1: inputs \(2, 16, 32\), targets \(2, 15, 32\)"):
        reconstruct(block, inputs, [targets[0], targets[1][:, 1:], *targets[2:]])
    with pytest.raises(ValueError, match="chunk 3 contains NaN or Inf"):
        reconstruct(block, inputs, [*targets[:3], targets[3] * float("nan"), *targets[4:]])
    name = next(iter(masks))
    with pytest.raises(ValueError, match="is not zero outside its mask"):
        reconstruct(block, inputs, targets, masks={name: ~masks[name]})


def by_channel(targets):
    """One over each channel's mean share of its token's energy, a tenth of the geometric mean at least, in float64."""
    rows = torch.cat([target.double().flatten(0, 1) for target in targets])
    shares = (rows.square() / rows.square().mean(1, keepdim=True)).mean(0)
    return 1 / shares.clamp(min=0.1 * float(shares.log().mean().exp()))


def test_a_channel_of_much_energy_does_not_take_over():
    """As in Gemma: relative to its channel's energy, the error of the others falls further than in the plain form."""
    left = {}
    for channels in ("alike", "energy"):
        block, inputs, targets, masks = pruned_block(loud=600.0)
        weights = by_channel(targets)
        assert float(weights.max() / weights.min()) > 100

        def relative(block, inputs=inputs, targets=targets, weights=weights):
            out, want = block(inputs[5]).double(), targets[5].double()
            energy = (want.square() * weights).mean(-1, keepdim=True)
            return float(((out - want).square() * weights / energy).sum())

        before = relative(block)
        record = reconstruct(block, inputs, targets, masks=masks, learning_rate=3e-3, channels=channels)
        left[channels] = relative(block) / before
        if channels == "energy":
            assert record["after"] / record["before"] == pytest.approx(left["energy"], rel=1e-4)
    assert left["energy"] < 0.9 * left["alike"]


def test_one_token_of_little_energy_does_not_take_over():
    """Its weight is one over its energy, which of one scaled by 0.001 is a million others'."""
    found = {}
    for scale in (1.0, 0.03, 0.001):
        block, inputs, targets, masks = pruned_block()
        targets = [target.clone() for target in targets]
        others = [target.clone() for target in targets]
        targets[0][0, 5] *= scale
        reconstruct(block, inputs, targets, masks=masks, learning_rate=1e-3, epochs=4, held_out=0.0)
        keep = torch.ones(targets[0].shape[:2], dtype=torch.bool)
        keep[0, 5] = False
        out = [block(chunk) for chunk in inputs]
        parts = [(out[0][keep], others[0][keep]), *zip(out[1:], others[1:], strict=True)]
        found[scale] = sum(float((a - b).square().sum()) for a, b in parts)
    assert found[0.03] < 1.2 * found[1.0] and found[0.001] < 1.2 * found[1.0]


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "Mixtral"])
def test_gradients_of_channels_are_those_of_the_whole_model(family):
    """Block by block backwards, against one backward pass through transformers' own loss, in float64."""
    model = build(family).double()
    blocks = discover(model, TOKENS[:1, :8])
    squares, hooks = {}, []

    def keep(index, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.register_hook(lambda g: squares.setdefault(index, []).append(g[:, 1:].square().mean(dim=(0, 1))))

    for block in blocks:
        hooks.append(block.module.register_forward_hook(lambda _, args, out, index=block.index: keep(index, out)))
    for row in TOKENS[:3]:
        (model(input_ids=row[None], labels=row[None], use_cache=False).loss * (len(row) - 1)).backward()
    for hook in hooks:
        hook.remove()
    asked = [parameter.requires_grad for parameter in model.parameters()]
    found = channel_gradients(model, blocks, TOKENS[:3], torch.device("cpu"))
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    for block, own in zip(blocks, found, strict=True):
        expected = torch.stack(squares[block.index]).mean(0).float()
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-9)
