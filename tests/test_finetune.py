"""Fine-tuning that keeps zeros, and what the dense model teaches."""

import copy
import json

import pytest
import torch
from families import build
from lightning.pytorch import Callback
from test_lora import TOKENS, bits, fit, linears_of, logits, same_bits, work_on
from torch.nn.functional import kl_div

from sparsekit.data import windows
from sparsekit.data.corpora import python_docs
from sparsekit.model import load_plain
from sparsekit.stages.finetune import finetune
from sparsekit.stages.lora import lora
from sparsekit.testing import begin
from sparsekit.train import precision
from sparsekit.train.losses import Objective, text_loss
from sparsekit.train.records import IGNORED
from sparsekit.train.teacher import Running, distance, divergence, divergence_of_top

QUICK = {"tokens": 6 * 8 * 32, "length": 32, "batch": 8, "learning_rate": 3e-4}


class Zeros(Callback):
    """After every step: pruned weights are zero, and so are their moments."""

    def __init__(self, work):
        self.work, self.steps = work, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        state = trainer.optimizers[0].state
        for name, linear in linears_of(self.work).items():
            pruned = ~self.work.masks()[name]
            moments = (state[linear.module.weight][key] for key in ("exp_avg", "exp_avg_sq"))
            for tensor in (linear.weight, *moments):
                assert not bits(tensor.masked_select(pruned)).any(), name


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-opt"])
def test_zeros_are_zero_after_every_step(family, models, tmp_path):
    """With momentum and weight decay."""
    work = work_on(models / family, tmp_path, pattern="2:4")
    zeros = Zeros(work)
    record = fit(finetune, work, weight_decay=0.5, watching=[zeros], **QUICK)
    assert zeros.steps == 6 and record["after"] < record["before"]
    assert record["trained_parameters"] == sum(p.numel() for block in work.blocks for p in block.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_kept_in_every_dtype(dtype, models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path, dtype=dtype)
    before = dict(copy.deepcopy(work.model).named_parameters())
    record = fit(finetune, work, **QUICK)
    assert record["after"] < record["before"]
    for name, linear in linears_of(work).items():
        assert not bits(linear.weight.masked_select(~work.masks()[name])).any()
    trained = {f"{block.name}.{inner}" for block in work.blocks for inner in block.trained}
    for name, parameter in work.model.named_parameters():
        assert parameter.dtype == dtype and parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, before[name]) or name in trained, name
    assert work.model.lm_head.weight is work.model.get_input_embeddings().weight
    assert not any(p._post_accumulate_grad_hooks for p in work.model.parameters())


def test_masked_gradients_train_as_a_masked_model_does(models, tmp_path):
    """Against AdamW on weight * mask in a loop of a few lines: the same weights."""
    work = work_on(models / "tiny-llama", tmp_path)
    oracle, masks = copy.deepcopy(work.model), work.masks()
    seen = []

    class Rows(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(batch[0].clone())

    record = fit(finetune, work, watching=[Rows()], **QUICK | {"warmup": 0.5})
    assert record["best_step"] == 6
    leaves = {name: p for name, p in oracle.named_parameters() if name.startswith("model.layers")}
    optimizer = torch.optim.AdamW(leaves.values(), weight_decay=0.0)
    shares = [1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.25]  # three steps up, then half a cosine over three
    for ids, share in zip(seen, shares, strict=True):
        weights = {f"{name}.weight": leaves[f"{name}.weight"] * mask for name, mask in masks.items()}
        out = torch.func.functional_call(oracle, weights, (), {"input_ids": ids, "use_cache": False}).logits
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-4 * share
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in leaves.items():
        torch.testing.assert_close(work.model.get_parameter(name), parameter, atol=2e-5, rtol=1e-4)


def test_norms_and_biases_alone(models, tmp_path):
    work = work_on(models / "tiny-opt", tmp_path)
    before = dict(copy.deepcopy(work.model).named_parameters())
    record = fit(finetune, work, trainable="norms-and-biases", **QUICK)
    assert record["after"] < record["before"]
    for name, parameter in work.model.named_parameters():
        trained = parameter.ndim == 1 and ".layers." in name
        assert torch.equal(parameter, before[name]) or trained
        assert not trained or "k_proj" in name or not torch.equal(parameter, before[name]), name
    assert record["trained_parameters"] == sum(
        p.numel() for name, p in work.model.named_parameters() if p.ndim == 1 and ".layers." in name
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resuming_gives_the_same_bits(dtype, models, tmp_path):
    """The teacher's cache too, which the resumed run finds; killed just after a validation, which rounds."""
    options = QUICK | {"distill": 0.5, "cache": 8, "weight_decay": 0.1, "steps": 5, "checks": 5}
    whole, killed, resumed = (
        work_on(models / "tiny-llama", tmp_path / name, dtype=dtype) for name in ("whole", "rest", "rest")
    )
    expected = fit(finetune, whole, **options)
    fit(finetune, killed, stop_at=3, **options)
    stamp = (tmp_path / "rest" / "blocks" / "checkpoints" / "dense.safetensors").stat().st_mtime_ns
    found = fit(finetune, resumed, resume=True, **options)
    assert same_bits(whole.model, resumed.model)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert (tmp_path / "rest" / "blocks" / "checkpoints" / "dense.safetensors").stat().st_mtime_ns == stamp


class Gradients(Callback):
    """The gradients of the first step of the optimizer."""

    found: torch.Tensor | None = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1 and self.found is None:
            self.found = torch.cat([leaf.grad.flatten() for leaf in module.leaves.values()])


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_four_batches_of_one_are_one_batch_of_four(distill, models, tmp_path, monkeypatch):
    """On rows with as many answers as it comes: a token counts the same in whatever batch it is."""
    monkeypatch.setattr("sparsekit.train.session.CLIP", None)
    records = [
        {"instruction": "Say it.", "output": " ".join(["a word"] * count)} for count in (1, 14, 2, 9, 3, 12, 1, 11) * 4
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = []
    for accumulate, batch in ((1, 4), (4, 1)):
        work = work_on(models / "tiny-llama", tmp_path / str(batch))
        seen = Gradients()
        more = {
            "accumulate": accumulate,
            "batch": batch,
            "source": {"source": str(file)},
            "distill": distill,
            "steps": 1,
        }
        fit(finetune, work, watching=[seen], **QUICK | {"length": 128, "checks": 1} | more)
        found.append(seen.found)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99999
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1, abs=1e-4)


def test_it_never_ends_worse_than_it_began(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path, dtype=torch.bfloat16)
    before = copy.deepcopy(work.model)
    record = fit(finetune, work, **QUICK | {"learning_rate": 5.0})
    assert record["after"] == record["before"] and record["best_step"] == 0
    assert same_bits(work.model, before)


def test_training_that_diverges_is_ended(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    before = copy.deepcopy(work.model)
    with pytest.warns(UserWarning, match="training diverged at step"):
        record = fit(finetune, work, **QUICK | {"learning_rate": 1e30})
    assert record["steps"] < 6 and same_bits(work.model, before)


# The dense model as a teacher


def held_out(work):
    """Windows of test text, (16, 64)."""
    return windows(python_docs("test"), work.tokenizer(), 64, 16)


def random_pair(vocabulary=20):
    generator = torch.Generator().manual_seed(0)
    own, dense = (torch.randn(2, 5, vocabulary, generator=generator) * 2 for _ in range(2))
    labels = torch.randint(0, vocabulary, (2, 5), generator=generator)
    labels[0, 2] = IGNORED
    return own, dense, labels


def test_text_loss_counts_what_is_predicted():
    own, _, labels = random_pair()
    total = text_loss(own[:, :-1], labels[:, 1:])
    terms = [
        -own[i, j - 1].double().log_softmax(0)[labels[i, j]]
        for i in range(2)
        for j in range(1, 5)
        if labels[i, j] != IGNORED
    ]
    assert len(terms) == 7 and float(total) == pytest.approx(float(sum(terms)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_that_of_hinton(temperature):
    own, dense, labels = random_pair()
    expected = 0.0
    for i in range(2):
        for j in range(1, 5):
            if labels[i, j] != IGNORED:
                p, q = ((each[i, j - 1].double() / temperature).softmax(0) for each in (dense, own))
                expected += temperature**2 * float((p * (p / q).log()).sum())
    assert float(divergence(own[:, :-1], dense[:, :-1], labels[:, 1:], temperature)) == pytest.approx(expected)
    assert float(divergence(own[:, :-1], own[:, :-1], labels[:, 1:], temperature)) == pytest.approx(0, abs=1e-5)


def test_divergence_of_the_largest_is_a_part_of_it():
    own, dense, labels = random_pair()
    own, dense, labels = own[:, :-1], dense[:, :-1], labels[:, 1:]
    whole = float(divergence(own, dense, labels, 2.0))
    parts = []
    for top in (2, 10, 20):
        best = (dense / 2.0).log_softmax(-1).topk(top)
        parts.append(float(divergence_of_top(own, *best, labels, 2.0)))
    assert parts == sorted(parts) and parts[0] < whole and parts[-1] == pytest.approx(whole, rel=1e-4)
    best = (dense / 2.0).log_softmax(-1).topk(1)
    p, q = ((each / 2.0).double().softmax(-1).gather(-1, best.indices)[..., 0] for each in (dense, own))
    two = torch.stack((q, 1 - q), -1).log(), torch.stack((p, 1 - p), -1)
    terms = kl_div(*two, reduction="none").sum(-1)[labels != IGNORED]
    assert float(divergence_of_top(own, *best, labels, 2.0)) == pytest.approx(4 * float(terms.sum()), rel=1e-4)


def test_distance_of_hidden_states():
    dense = tuple(torch.randn(2, 3, 8) for _ in range(2))
    labels = torch.zeros(2, 3, dtype=torch.long)
    assert float(distance(dense, dense, labels)) == 0
    more = tuple(1.5 * each for each in dense)
    assert float(distance(more, dense, labels)) == pytest.approx(4 * 0.25)  # four tokens predict another
    labels[0] = IGNORED  # a prompt, or padding
    more[0][0] += 100
    assert float(distance(more, dense, labels)) == pytest.approx(2 * 0.25)
    with pytest.raises(ValueError, match="the dense model has 2 layers of width 8, the pruned one 1 of 8"):
        distance(dense[:1], dense, labels)


def test_a_teacher_that_agrees_teaches_nothing():
    model = build("Llama")
    objective = Objective(Running(lambda: copy.deepcopy(model)), distill=1.0, hidden=1.0, temperature=2.0)
    loss, text, count = objective(model, TOKENS, TOKENS, torch.arange(2))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4) and text / count > 1 and count == 2 * 11


def test_the_dense_model_teaches(models, tmp_path):
    """Its logits, streamed or from the cache, bring the pruned model nearer to it than the text alone does."""
    dense, _ = load_plain(models / "tiny-llama")
    divergences = {}
    for name, more in {"text": {}, "streamed": {"distill": 1.0}, "cached": {"distill": 1.0, "cache": 64}}.items():
        work = work_on(models / "tiny-llama", tmp_path / name)
        tokens = held_out(work)
        fit(lora, work, **QUICK | {"learning_rate": 2e-3, "tokens": 12_000, "patience": None}, **more)
        own, other = (logits(model, tokens)[:, :-1] for model in (work.model, dense))
        divergences[name] = float(divergence(own, other, tokens[:, 1:], 1.0))
    assert divergences["streamed"] < divergences["text"]
    assert divergences["cached"] == pytest.approx(divergences["streamed"], rel=0.02)


def test_hidden_states_come_nearer(models, tmp_path):
    dense, _ = load_plain(models / "tiny-llama")
    distances = []
    for hidden in (0.0, 2.0):
        work = work_on(models / "tiny-llama", tmp_path)
        tokens = held_out(work)
        fit(finetune, work, hidden=hidden, **QUICK)
        with torch.no_grad():
            found = [
                m(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
                for m in (work.model, dense)
            ]
        distances.append(float(distance(*found, tokens)))
    assert distances[1] < distances[0]


def test_precision_follows_the_device():
    assert precision(torch.device("cpu")) == "32-true"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_decay": -1.0}, "option `weight_decay` is -1.0, must be at least 0"),
        ({"learning_rate": -1.0}, "option `learning_rate` is -1.0"),
        ({"checks": 0}, "option `checks` is 0, must be at least 1"),
        ({"temperature": 0.0}, "option `temperature` is 0.0, must be above 0"),
        ({"source": {"source": "python-docs", "format": "record"}}, "`format` is 'record'"),
    ],
)
def test_mistakes_are_said_before_the_model_is_touched(options, said, models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    with pytest.raises(ValueError, match=said):
        begin(finetune, work, **options)


def test_a_mask_that_is_not_that_of_the_weights(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    next(iter(linears_of(work).values())).weight.fill_(1.0)
    with pytest.raises(ValueError, match="not zero outside its mask"):
        finetune(work, **QUICK)
