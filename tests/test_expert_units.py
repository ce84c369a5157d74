"""Whole experts as units: masked, cut and stored models agree, and plain transformers loads what is left."""

from pathlib import Path

import pytest
import torch
import transformers
from test_experts import BASE, FOUR, TOKENS, logits, model_of

import sparsekit
from sparsekit.cli import main
from sparsekit.contracts import scores
from sparsekit.criteria.expert_activation import expert_activation
from sparsekit.criteria.expert_frequency import expert_frequency
from sparsekit.criteria.reap import reap
from sparsekit.model import discover
from sparsekit.model.structure import Shape, choose, find_units, masking
from sparsekit.model.structure.cutting import cut
from sparsekit.testing import check_criterion, context, fuzz_criterion

MOE = Path(__file__).parent / "models" / "tiny-moe"
MORE = {
    "Qwen3Moe": BASE
    | FOUR
    | {"num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 48, "mlp_only_layers": [0]},
    "MiniMaxM2": BASE | FOUR | {"num_local_experts": 4, "intermediate_size": 16, "rotary_dim": 4},  # score biases
    "Ernie4_5_Moe": BASE  # the same, in a matrix of one row
    | FOUR
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "intermediate_size": 48}
    | {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
}


def family_of(family: str) -> torch.nn.Module:
    if family not in MORE:
        return model_of(family)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MORE[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.normal_(std=0.1)
    return model


FAMILIES = ("Mixtral", "GptOss", "Qwen3Moe", "MiniMaxM2", "NemotronH", "Llama4Text", "DeepseekV3", "Ernie4_5_Moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_and_cut_models_agree(family):
    model = family_of(family)
    whole = logits(model)
    blocks = discover(model, TOKENS[:1, :8])
    units = find_units(model, blocks, ["experts"])
    assert all(part.count == 4 for part in units.parts) and units.kinds == ["experts"]
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    remove = float(units.parameters[0]) * len(units.parts) / units.total
    kept = choose(units, scores, remove, shape="uniform")
    assert all(int(each.sum()) == 3 for each in units.split(kept))
    with masking(blocks, units) as mask:
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
        mask(kept)
        masked = logits(model)
        mask(torch.ones_like(kept))
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
        mask(kept)
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
    before = sum(p.numel() for block in blocks for p in block.module.parameters())
    cut(model, blocks, units, kept)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-5)
    assert (masked - whole).abs().max() > 1e-4
    after = sum(p.numel() for block in discover(model, TOKENS[:1, :8]) for p in block.module.parameters())
    assert before - after == int(units.parameters[~kept].sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_loads_in_plain_transformers(family, tmp_path):
    model = family_of(family)
    names = set(model.state_dict())
    result = sparsekit.prune(
        model, pattern="2:4", stages=[{"reap": {"remove": "10%"}}, "sparsegpt"], calibration=TOKENS, copy=True
    )
    assert result.verified, result.verify()
    result.save(tmp_path / "run")
    again = type(model).from_pretrained(tmp_path / "run" / "model")
    assert set(again.state_dict()) == names
    torch.testing.assert_close(logits(again), logits(result.model), rtol=1e-4, atol=1e-5)
    assert Shape.read(tmp_path / "run" / "model").layout == "plain"
    out = again.generate(input_ids=TOKENS[:1, :8], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 12)


@pytest.mark.parametrize("criterion", [reap, expert_frequency, expert_activation])
def test_they_are_criteria(criterion):
    check_criterion(criterion)
    fuzz_criterion(criterion)


def test_the_fuzz_sees_an_expert_criterion_that_gives_no_number():
    @scores("experts")
    def wrong(context, units, *, remove):
        """Nothing finite."""
        return torch.full((len(units),), float("nan"))

    with pytest.raises(AssertionError, match="not all finite"):
        fuzz_criterion(wrong)


def test_an_adapter_of_experts_that_peft_could_not_open_is_refused(tmp_path, capsys):
    """Only the dense one: with masks it is sparsekit's own, which knows experts."""
    lines = [f"model: {MOE}", f"output: {tmp_path / 'run'}", "stages: [{lora: {merge: false, steps: 1, length: 32}}]"]
    lines += ["calibration: {source: python-docs, samples: 4, length: 32}", "evaluate: {samples: false}"]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    assert main(["fit", "--recipe", str(tmp_path / "r.yaml")]) == 2
    assert "experts lie in one parameter there" in " ".join(capsys.readouterr().err.split())


def test_scores_are_those_of_a_loop_over_tokens(tmp_path):
    """Against the fused module's own weights, one token after another in float64."""
    model = model_of("Mixtral")
    fused = model.model.layers[0].mlp
    given = []
    handle = fused.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    logits(model)
    handle.remove()
    rows = given[0].reshape(-1, 32).double()
    count, norms, weighted = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    experts = fused.experts
    for row in rows:
        chances = torch.softmax(fused.gate.weight.double() @ row, 0)
        best = chances.topk(2)
        for weight, index in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up = (experts.gate_up_proj[index].double() @ row).chunk(2)
            out = experts.down_proj[index].double() @ (torch.nn.functional.silu(gate) * up)
            count[index] += 1
            norms[index] += float(out.norm())
            weighted[index] += float(weight * out.norm())
    here = context(model, TOKENS, tmp_path, batch=2, index=1)
    units = find_units(model, here.blocks, ["experts"])
    found = {c: c(here, units, remove=0.1)[:4] for c in (reap, expert_frequency, expert_activation)}
    torch.testing.assert_close(found[expert_frequency], count)
    torch.testing.assert_close(found[expert_activation], norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[reap], weighted / count, rtol=1e-5, atol=1e-6)


def test_policy_gradient_removes_whole_experts(tmp_path):
    """As many from each block; what it gains over the criteria is measured in benchmarks/experts.py."""
    model = model_of("Mixtral")
    options = {"remove": "10%", "units": "experts", "steps": 6, "masks": 2, "length": 24}
    result = sparsekit.prune(model, stages=[{"policy-gradient": options}], calibration=TOKENS.repeat(4, 1))
    assert result.verified
    result.save(tmp_path / "run")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.num_local_experts == 3
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"reap": {"remove": "10%", "shape": "free"}}, "one number of experts for all blocks"),
        ({"reap": {"remove": "80%"}}, "can give up"),
        ({"reap": {"remove": "10%", "units": "channels"}}, "scores experts, not channels"),
        ({"reap": {"remove": "10%", "compensate": True}}, "compensate: true makes up for heads, channels"),
    ],
)
def test_what_cannot_be_is_said_in_advance(stage, said):
    model = model_of("Mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        sparsekit.prune(model, stages=[stage], calibration=TOKENS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_families_whose_experts_cannot_go_are_refused():
    for family, said in (("JetMoe", "several lists of experts"), ("Dbrx", "no field of the config")):
        with pytest.raises(ValueError, match=said):
            sparsekit.prune(model_of(family), stages=[{"reap": {"remove": "10%"}}], calibration=TOKENS)
    with pytest.raises(ValueError, match="no experts that sparsekit knows"):
        sparsekit.prune(_dense(), stages=[{"reap": {"remove": "10%"}}], calibration=TOKENS)


def _dense() -> torch.nn.Module:
    config = transformers.LlamaConfig(**BASE | {"intermediate_size": 48})
    return transformers.LlamaForCausalLM(config).eval()
