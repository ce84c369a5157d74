"""Allocation rules: exact totals, the order that theory demands, mixtures of n:m, and runs with them."""

import copy
import json
import random
import shutil
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from families import SETTINGS, build
from test_run import TINY, bits, fit, process, recipe
from torch import nn

from sparsekit import registry
from sparsekit.allocators.depth import depth
from sparsekit.allocators.owl import owl
from sparsekit.allocators.rearrange import rearrange
from sparsekit.allocators.sensitivity import LEVELS, sensitivity
from sparsekit.allocators.sensitivity import _between as between
from sparsekit.allocators.sensitivity import _costs as costs
from sparsekit.maths import NM, Allocation, Stats, Unstructured, conserve, mixture, parse, row_factors
from sparsekit.model import Block, discover
from sparsekit.recipe import load_recipe
from sparsekit.run.measured import there_and_back
from sparsekit.run.plan import allocate as allocate_patterns
from sparsekit.system import Team
from sparsekit.train import curvature
from sparsekit.walk import OneShot, weights_and_norms

TOKENS = torch.randint(1, 96, (5, 24), generator=torch.Generator().manual_seed(1))
BY_OWL = ["--set", "pattern=60%", "allocation={owl: {threshold: 3}}", "stages=[wanda]", "keep=true"]
KINDS = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def total(given, linears):
    return sum(given[name] * count for name, count in linears.items()) / sum(linears.values())


def transformer(rng, equal=False):
    """Counts and groups of a model whose blocks, and the linears in them, differ in size."""
    groups = [[[f"{b}.{name}" for name in group] for group in KINDS] for b in range(rng.randint(2, 6))]
    sizes = {name: rng.randint(1, 400) * 8 for group in KINDS for name in group}
    names = [name for block in groups for group in block for name in group]
    return {name: sizes[name.split(".")[1]] if equal else rng.randint(1, 400) * 8 for name in names}, groups


def heavy_tailed(linears, rng):
    """Random weights (4, 8) and norms; the higher a block's number, the fewer the outliers."""
    draw = torch.Generator().manual_seed(rng.randint(0, 9**9))
    for name in linears:
        weight = torch.randn(40, 8, generator=draw)
        weight[: 16 // (int(name.split(".")[0]) + 1), 0] = 100
        yield name, weight, torch.rand(8, generator=draw) + 0.5


# ---- the total


def test_conserve_is_exact_and_within_bounds():
    rng = random.Random(0)
    cut = 0
    for _ in range(300):
        linears = {str(i): rng.randint(1, 10**6) for i in range(rng.randint(1, 30))}
        wanted = {name: rng.uniform(-1, 1) * rng.choice([0.01, 0.3, 2]) for name in linears}
        sparsity = rng.choice([0, 0.004, 0.02, 0.5, 0.9, 0.97, 0.998])
        given = conserve(wanted, linears, sparsity)
        assert total(given, linears) == pytest.approx(sparsity, rel=1e-9, abs=1e-12)
        low, high = min(0.01, sparsity), max(0.99, sparsity)
        assert all(low <= value <= high for value in given.values())
        order = sorted(linears, key=wanted.__getitem__)
        assert [given[name] for name in order] == sorted(given.values())
        free = {given[n] - wanted[n] for n in linears if low + 1e-9 < given[n] < high - 1e-9}
        assert not free or max(free) - min(free) < 1e-12  # one shift for all that no bound holds
        cut += sum(value in (low, high) for value in given.values())
    assert cut > 300


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("rule", ["depth", "rearrange", "owl"])
def test_every_rule_conserves_the_total(rule, sparsity):
    rng = random.Random(0)
    for _ in range(20):
        linears, groups = transformer(rng)
        if rule == "depth":
            given = depth(linears, sparsity, groups, slope=rng.uniform(-0.99, 0.99))
        elif rule == "owl":
            given = owl(linears, sparsity, groups, heavy_tailed(linears, rng), spread=rng.uniform(0, 0.5))
        else:
            try:
                given = rearrange(linears, sparsity, groups, alpha=rng.random(), beta=rng.random())
            except ValueError as error:
                assert "which must be below 1" in str(error) and sparsity > 0.5
                continue
        assert given.keys() == linears.keys()
        assert total(given, linears) == pytest.approx(sparsity, rel=1e-9)
        assert all(0.01 <= value <= 0.99 for value in given.values())


# ---- depth


def test_depth_is_linear_and_the_ends_differ_by_the_slope():
    linears, groups = transformer(random.Random(1))
    given = depth(linears, 0.5, groups, slope=-0.2)
    blocks = [{given[name] for group in block for name in group} for block in groups]
    assert all(len(values) == 1 for values in blocks)
    values = [block.pop() for block in blocks]
    assert values[-1] - values[0] == pytest.approx(-0.2)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([-0.2 / len(steps)] * len(steps))
    assert depth({"a": 3}, 0.5, [[["a"]]]) == {"a": 0.5}
    for slope in (1.0, float("nan")):
        with pytest.raises(ValueError, match="give a number above -1 and below 1"):
            depth(linears, 0.5, groups, slope=slope)


# ---- owl


def test_owl_against_its_formula():
    """Blocks of one size: the published formula, written out with one long vector of scores for each block."""
    rng = random.Random(3)
    linears, groups = transformer(rng, equal=True)
    dense = list(heavy_tailed(linears, rng))
    shares = []
    for block in range(len(groups)):
        mine = [(w, n) for name, w, n in dense if name.startswith(f"{block}.")]
        scores = torch.cat([(w.abs() * n).flatten() for w, n in mine])
        shares.append((scores > 5 * scores.mean()).double().mean().item())
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    kept = [(share - min(shares)) / (max(shares) - min(shares)) * 2 * 0.08 for share in shares]
    kept = [value - sum(kept) / len(kept) + 1 - 0.7 for value in kept]
    given = owl(linears, 0.7, groups, iter(dense))
    for name in linears:
        assert given[name] == pytest.approx(1 - kept[int(name.split(".")[0])], abs=1e-9)
    assert given["0.q"] == min(given.values())  # most outliers, least sparsity


def test_owl_says_when_it_has_nothing_to_say():
    linears, groups = transformer(random.Random(3), equal=True)
    flat = [(name, torch.ones(2, 4), torch.ones(4)) for name in linears]
    with pytest.warns(UserWarning, match="all get the same sparsity"):
        assert set(owl(linears, 0.7, groups, flat).values()) == {0.7}
    for options, said in (({"threshold": 0.0}, "a number above 0"), ({"spread": 0.6}, "a number from 0 to 0.5")):
        with pytest.raises(ValueError, match=said):
            owl(linears, 0.7, groups, flat, **options)


# ---- rearrange


def test_rearrange_as_published_where_the_sides_are_equal():
    names = [["q", "k", "v"], ["o"], ["fc1"], ["fc2"]]
    groups = [[[f"{b}.{name}" for name in group] for group in names] for b in range(4)]
    sizes = {"q": 4, "k": 4, "v": 4, "o": 4, "fc1": 12, "fc2": 12}
    linears = {f"{b}.{name}": size for b in range(4) for name, size in sizes.items()}
    given = rearrange(linears, 0.5, groups, alpha=0.7, beta=0.6)
    first = 0.5 + 0.5 * 0.3 / 3  # eq. 2
    for b, share in enumerate([first, first, first, 0.35]):
        change = 0.6 * (1 - 0.5)  # the sparsity of the model
        assert given[f"{b}.q"] == given[f"{b}.v"] == pytest.approx(share * (1 - change))  # eq. 3
        assert given[f"{b}.o"] == given[f"{b}.fc1"] == pytest.approx(share)
        assert given[f"{b}.fc2"] == pytest.approx(share * (1 + change))  # eq. 4


def test_rearrange_of_opt_spares_qkv_fully_and_charges_fc2_less():
    """|q, k, v| = 3 d^2 and |fc2| = 4 d^2, where the published pair removes too much."""
    linears = {"q": 1, "k": 1, "v": 1, "o": 1, "fc1": 4, "fc2": 4}
    given = rearrange(linears, 0.5, [[["q", "k", "v"], ["o"], ["fc1"], ["fc2"]]], alpha=1, beta=0.8)
    assert given["q"] == pytest.approx(0.5 * 0.6) and given["fc2"] == pytest.approx(0.5 * (1 + 0.4 * 3 / 4))


def test_rearrange_keeps_every_sparsity_below_one():
    rng = random.Random(5)
    for _ in range(50):
        linears, groups = transformer(rng)
        given = rearrange(linears, rng.uniform(0.01, 0.989), groups, alpha=1, beta=1)
        assert min(given.values()) > 0 and max(given.values()) < 1


def test_rearrange_says_what_cannot_be():
    linears, groups = transformer(random.Random(5), equal=True)
    two = {name: count for name, count in linears.items() if name[0] in "01"}
    with pytest.raises(ValueError, match=r"alpha 0\.5 at 0\.9 in total leaves .* 1\.35, which .* alpha above 0\.8889"):
        rearrange(two, 0.9, groups[:2], alpha=0.5)
    rearrange(two, 0.9, groups[:2], alpha=0.8891)
    with pytest.raises(ValueError, match="in a model of one block no other takes over; give alpha: 1"):
        rearrange({"a": 4}, 0.5, [[["a"]]])
    with pytest.raises(ValueError, match=r"beta is -1; at a sparsity of 0\.5 give a number from 0 to 2"):
        rearrange(two, 0.5, groups[:2], beta=-1)


@pytest.mark.parametrize(
    ("family", "less", "more"), [("Phi", "q_proj k_proj v_proj fc1", "fc2"), ("GPT2", "c_attn", "mlp.c_proj")]
)
def test_rearrange_finds_the_ends_of_a_block(family, less, more):
    """Parallel attention reads what fc1 reads; a fused qkv is one linear."""
    blocks = discover(build(family, "meta").bfloat16(), TOKENS[:1, :8].to("meta"))
    linears = {name: linear.weight.numel() for block in blocks for name, linear in block.linears.items()}
    given = rearrange(linears, 0.5, [block.groups for block in blocks], alpha=1)
    assert {name for name in linears if given[name] < 0.499} == {n for n in linears if n.endswith(tuple(less.split()))}
    assert {name for name in linears if given[name] > 0.501} == {n for n in linears if n.endswith(more)}


# ---- mixtures of n:m


def removed(mixed, linears):
    return sum((p.group - p.kept) * linears[name] for name, p in mixed.items())


def best(fractions, linears, pattern):
    """By trying everything: the least sum of parameters x (k - m fraction)^2."""
    gone, least = (pattern.group - pattern.kept) * sum(linears.values()), float("inf")
    for ks in product(range(1, pattern.group), repeat=len(linears)):
        if sum(k * count for k, count in zip(ks, linears.values(), strict=True)) == gone:
            pairs = zip(ks, linears.items(), strict=True)
            least = min(least, sum(c * (k - pattern.group * fractions[name]) ** 2 for k, (name, c) in pairs))
    return least


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), NM(1, 2)])
def test_mixture_is_the_best_there_is(pattern):
    rng = random.Random(str(pattern))
    for _ in range(30):
        linears = {name: 20 * rng.choice([1, 1, 2, 3, 5, 7]) for name in "abcdef"[: rng.randint(2, 5)]}
        spread = {name: rng.uniform(-0.3, 0.3) for name in linears}
        bounds = {"lowest": 1 / pattern.group, "highest": 1 - 1 / pattern.group}
        fractions = conserve(spread, linears, pattern.sparsity, **bounds)
        mixed = mixture(fractions, linears, pattern, [[name] for name in linears])
        assert removed(mixed, linears) == (pattern.group - pattern.kept) * sum(linears.values())
        cost = sum(
            linears[name] * (p.group - p.kept - pattern.group * fractions[name]) ** 2 for name, p in mixed.items()
        )
        assert cost == pytest.approx(best(fractions, linears, pattern), abs=1e-6)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), NM(5, 8), NM(12, 16), NM(8, 32)])
def test_mixture_removes_exactly_as_much_as_uniform(pattern):
    rng = random.Random(str(pattern))
    for equal in (True, False):
        for _ in range(3):
            linears, groups = transformer(rng, equal)
            fractions = depth(linears, pattern.sparsity, groups, slope=rng.choice([-0.8, 0.7, 0.9]))
            blocks = [[name for group in block for name in group] for block in groups]
            mixed = mixture(fractions, linears, pattern, blocks)
            assert mixed.keys() == linears.keys()
            assert removed(mixed, linears) == (pattern.group - pattern.kept) * sum(linears.values())
            assert {p.group for p in mixed.values()} == {pattern.group}
            assert len({p.kept for p in mixed.values()}) > 1
            if equal:  # largest remainder among whole blocks
                for block in blocks:
                    assert len({mixed[name] for name in block}) == 1


def test_mixture_of_equal_blocks_is_largest_remainder():
    linears, groups = transformer(random.Random(7), equal=True)
    groups = [[[f"{b}.{name}" for name in group] for group in KINDS] for b in range(8)]
    linears = {name: linears[f"0.{name.split('.')[1]}"] for block in groups for group in block for name in group}
    fractions = depth(linears, 0.625, groups, slope=0.3)
    blocks = [[name for group in block for name in group] for block in groups]
    wanted = [8 * fractions[f"{b}.q"] for b in range(8)]
    rounded = [int(value) for value in wanted]
    for b in sorted(range(8), key=lambda b: rounded[b] - wanted[b])[: 40 - sum(rounded)]:
        rounded[b] += 1
    mixed = mixture(fractions, linears, NM(3, 8), blocks)
    assert [8 - mixed[f"{b}.q"].kept for b in range(8)] == rounded


def test_mixture_of_a_constant_is_the_pattern_and_bounds_hold():
    linears = {"a": 7 * 8, "b": 8}
    assert set(mixture({"a": 0.5, "b": 0.5}, linears, NM(4, 8), [["a"], ["b"]]).values()) == {NM(4, 8)}
    even = {"a": 80, "b": 80}
    mixed = mixture({"a": 0.01, "b": 0.99}, even, NM(2, 4), [["a"], ["b"]])
    assert mixed == {"a": NM(3, 4), "b": NM(1, 4)}  # never all of a group, never none


# ---- the dense pass


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Phi", "Gemma3", "Mixtral"])
def test_the_dense_pass_sees_what_the_model_sees(family):
    """Against hooks on a plain forward pass of the whole model, which stays as it was."""
    model = build(family)
    blocks = discover(model, TOKENS[:1, :8])
    before = copy.deepcopy(model.state_dict())
    seen = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].detach()))
        for block in blocks
        for name in block.linears
    ]
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    order = [name for block in blocks for group in block.groups for name in group]
    found = list(weights_and_norms(model, blocks, TOKENS, batch=2, budget=1000))
    assert [name for name, _, _ in found] == order
    for name, weight, norms in found:
        assert torch.equal(weight, next(b for b in blocks if name in b.linears).linears[name].weight)
        if ".experts." in name:  # while watched, these are given a few tokens that are not theirs
            continue
        x = seen[name].double().reshape(-1, weight.shape[1])
        torch.testing.assert_close(norms.double(), x.square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, expected)


def test_the_dense_pass_is_lazy_and_refuses_what_is_not_finite(tmp_path):
    model = build("Llama")
    blocks = discover(model, TOKENS[:1, :8])
    blocks[1].linears[blocks[1].groups[3][0]].weight[0, 0] = float("nan")
    given = weights_and_norms(model, blocks, TOKENS, budget=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    name, _, _ = next(given)
    assert name == blocks[0].groups[0][0] and list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj .* NaN or Inf"):
        list(given)
    assert not list(tmp_path.iterdir())  # nothing is left behind


# ---- the contract


def test_groups_and_dense_are_no_options():
    entry = registry.find("allocators", "owl")
    assert [option.name for option in registry.describe(entry).options] == ["threshold", "spread"]
    assert list(registry.options(owl)) == ["threshold", "spread"] and registry.asks(owl) == ("groups", "dense")
    assert set(registry.option_problems(owl, {"dense": [], "groups": []})) == {"dense", "groups"}
    assert registry.asks(depth) == registry.asks(rearrange) == ("groups",)
    assert registry.asks(registry.load("allocators", "uniform")) == ()


def plain(linears, sparsity, *, bad: bool = False):
    """A rule that asks for nothing."""
    return dict.fromkeys(linears, sparsity + (0.1 if bad else 0))


@pytest.fixture
def allocate(tmp_path, monkeypatch):
    """`plan.allocate` on a random model, with the settings of a recipe and any function as the rule."""

    def run(pattern, rule="uniform", function=None, seen=None, family="Llama"):
        file = recipe(tmp_path)
        blocks = discover(build(family, "meta").bfloat16(), TOKENS[:1, :8].to("meta"))
        if function is not None:
            monkeypatch.setattr(registry, "load", lambda group, name: function)
        return allocate_patterns(load_recipe(file, [f"pattern={pattern}", f"allocation={rule}"]), blocks, seen)

    return run


def test_a_plain_rule_goes_on_working(allocate):
    assert set(allocate("60%", function=plain).values()) == {Unstructured(0.6)}
    assert set(allocate("2:4", function=plain).values()) == {NM(2, 4)}
    with pytest.raises(ValueError, match=r"gives 60\.0000% in total, 2:4 was asked"):
        allocate("2:4", "{uniform: {bad: true}}", plain)


def test_a_rule_that_looks_waits_for_the_dense_model(allocate):
    def looks(linears, sparsity, dense):
        assert [name for name, _, _ in dense] == list(linears)
        return dict.fromkeys(linears, sparsity)

    assert set(allocate("60%", function=looks).values()) == {Unstructured(0.6)}
    with pytest.raises(AssertionError):
        allocate("60%", function=looks, seen={"dense": []})


def test_rules_with_nm(allocate):
    mixed = allocate("3:8", "{depth: {slope: 0.25}}")
    assert {str(p) for p in mixed.values()} == {"2:8", "3:8", "4:8"}
    assert len(set(allocate("2:4", "{rearrange: {beta: 1}}").values())) > 1
    with pytest.warns(UserWarning, match="`depth` gives .* which all round to 2:4: it changes nothing"):
        assert set(allocate("2:4", "{depth: {slope: 0.1}}").values()) == {NM(2, 4)}


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_every_family_can_be_rearranged(allocate, family):
    given = allocate("70%", "rearrange", family=family)
    assert len(set(given.values())) > 1


# ---- whole runs


@pytest.fixture(scope="module")
def by_owl(tmp_path_factory):
    """A finished run at 60 % by OWL, its blocks kept."""
    folder = tmp_path_factory.mktemp("owl")
    done = fit(recipe(folder), *BY_OWL)
    assert done.returncode == 0, done.stderr
    assert "a pass through the dense model, for allocation by owl" in done.stdout
    return folder / "run"


def test_a_run_by_owl(by_owl):
    report = json.loads((by_owl / "report.json").read_text())
    assert report["verified"] is True and "allocate" in {stage["name"] for stage in report["stages"]}
    linears = report["sparsity"]["per_linear"]
    asked = {name: parse(each["pattern"]).sparsity for name, each in linears.items()}
    counts = {name: each["parameters"] for name, each in linears.items()}
    assert total(asked, counts) == pytest.approx(0.6, rel=1e-9)
    assert len(set(asked.values())) == len({name.split(".layers.")[1][0] for name in linears})
    assert max(asked.values()) - min(asked.values()) == pytest.approx(0.16)
    assert report["sparsity"]["total"] == pytest.approx(0.6, abs=0.01)
    assert report["recipe"]["allocation"] == {"owl": {"threshold": 3, "spread": 0.08}}


def test_a_killed_run_goes_on_with_the_same_patterns(by_owl, tmp_path):
    """Killed in the second block: the allocation is read, not computed, and the result is the same bit for bit."""
    code = """
    import sys
    from sparsekit import cli
    from sparsekit.walk import commits
    import os, signal
    real, calls = commits.Commits.commit, []
    def commit(self, block):
        calls.append(block)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, block)
    commits.Commits.commit = commit
    cli.main(sys.argv[1:])
    """
    file = recipe(tmp_path)
    killed = process(code, "fit", "--recipe", file, *BY_OWL)
    assert killed.returncode == -9, killed.stderr
    stored = tmp_path / "run" / "blocks" / "allocation.json"
    assert json.loads(stored.read_text()) == json.loads((by_owl / "blocks" / "allocation.json").read_text())
    resumed = fit(file, "--resume", *BY_OWL)
    assert resumed.returncode == 0, resumed.stderr
    assert "dense model, for allocation" not in resumed.stdout
    assert bits(tmp_path / "run") == bits(by_owl)


def test_a_mixture_by_owl(tmp_path):
    settings = ["pattern=3:8", "allocation={owl: {threshold: 3, spread: 0.25}}", "stages=[wanda]", "evaluate={}"]
    done = fit(recipe(tmp_path), "--set", *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    patterns = {each["pattern"] for each in report["sparsity"]["per_linear"].values()}
    assert report["verified"] is True and len(patterns) > 1 and all(text.endswith(":8") for text in patterns)
    assert report["sparsity"]["zeros"] * 8 == report["sparsity"]["parameters"] * 5
    shutil.rmtree(tmp_path / "run")


def test_a_dry_run_says_what_is_not_known_yet(tmp_path):
    done = fit(recipe(tmp_path), "--dry-run", "--set", "allocation=owl", "pattern=60%")
    assert done.returncode == 0 and done.stdout.count("set after a dense pass by owl") >= 7
    assert "in 3 passes" in done.stdout and not (tmp_path / "run").exists()
    done = fit(recipe(tmp_path), "--dry-run", "--set", "allocation={depth: {slope: 0.5}}", "pattern=60%")
    assert done.returncode == 0 and "35%" in done.stdout and "85%" in done.stdout


def test_a_dry_run_names_the_blocks_that_are_alike(tmp_path, monkeypatch):
    """Blocks of one mixture need not follow one another."""

    def every_third(linears, sparsity, *, by: float = 0.25):
        return conserve({name: by * (name.split(".")[2] in "03") for name in linears}, linears, sparsity)

    real = registry.load
    monkeypatch.setattr(
        registry, "load", lambda group, name: every_third if group == "allocators" else real(group, name)
    )
    done = fit(recipe(tmp_path), "--dry-run", "--set", "pattern=4:8")
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:] for line in done.stdout.splitlines() if "q_proj" in line]
    assert [(row[0].strip(), row[-2].strip()) for row in rows] == [("0, 3", "3:8"), ("1-2", "5:8")]


# ---- sensitivity


def seen_of(linears, rng, rows=6, width=16):
    """Random weights, Gram matrices and gradients of linears; the curves differ by orders of magnitude."""
    draw = torch.Generator().manual_seed(rng.randint(0, 9**9))
    for name in linears:
        inputs = torch.randn(64, width, generator=draw) * 10 ** rng.uniform(-1, 1)
        yield name, torch.randn(rows, width, generator=draw), inputs.T @ inputs, torch.rand(rows, generator=draw)


def test_sensitivity_is_the_cheapest_of_all_choices():
    """Against every choice of three linears on a grid: none of the same total costs less."""
    rng = random.Random(5)
    for _ in range(5):
        linears = dict.fromkeys("abc", 96)
        seen = list(seen_of(linears, rng))
        at = torch.arange(0.2, 0.8001, 0.02, dtype=torch.float64)
        curves = {name: between(costs(*rest), at) for name, *rest in seen}
        given = sensitivity(linears, 0.5, iter(seen), spread=0.3).sparsity
        own = sum(
            float(between(costs(*rest), torch.tensor([given[name]], dtype=torch.float64))) for name, *rest in seen
        )
        least = min(
            sum(float(curves[name][i]) for name, i in zip("abc", choice, strict=True))
            for choice in product(range(len(at)), repeat=3)
            if abs(sum(float(at[i]) for i in choice) / 3 - 0.5) < 1e-9
        )
        assert own <= 1.02 * least and total(given, linears) == pytest.approx(0.5, abs=1e-9)
        assert all(0.2 - 1e-9 <= value <= 0.8 + 1e-9 for value in given.values())


def test_the_cost_of_a_linear_is_the_quadratic_form():
    """In float64, weight by weight: Wanda's mask of each row, then sum_i g_i (D H D^T)_ii."""
    [(_, weight, gram, gradients)] = seen_of(["a"], random.Random(7))
    found = costs(weight, gram, gradients)
    for level, cost in zip(LEVELS, found.tolist(), strict=True):
        removed = torch.zeros(weight.shape, dtype=torch.float64)
        for row, values in enumerate(weight):
            order = sorted(range(16), key=lambda j, values=values: float(values[j].abs() * gram[j, j].sqrt()))
            for j in order[: round(level * 16)]:
                removed[row, j] = values[j]
        form = removed @ gram.double() @ removed.T
        assert cost == pytest.approx(float(form.diagonal() @ gradients.double()), rel=1e-4)


def test_sensitivity_says_what_it_cannot_tell():
    linears = {"a": 96, "b": 96, "expert": 96}
    seen = list(seen_of(linears, random.Random(2)))
    seen[2] = ("expert", seen[2][1], 0 * seen[2][2], 0 * seen[2][3])
    with pytest.warns(UserWarning, match="no token of the text came by 1 linears, expert the first"):
        given, rows = sensitivity(linears, 0.6, iter(seen))
    assert rows.keys() == {"a", "b"} and torch.equal(rows["a"], seen[0][3])
    assert given["expert"] == 0.6 and given["a"] != given["b"] and total(given, linears) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="spread is 0"):
        sensitivity(linears, 0.6, iter(seen), spread=0.0)
    with pytest.warns(UserWarning, match="no choice"):
        assert set(sensitivity(linears, 0.97, iter(seen)).sparsity.values()) == {0.97}


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral"])
def test_curvature_is_that_of_the_whole_model(family):
    """Block by block backwards, against one backward pass through transformers' own loss, in float64."""
    model = build(family).double()
    blocks = discover(model, TOKENS[:1, :8])
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    inputs, gradients, hooks = {}, {}, []

    def rows(x):
        return (x[:, 1:] if x.dim() > 2 else x).reshape(-1, x.shape[-1])

    def keep(name, module, args, out):
        inputs.setdefault(name, []).append(rows(args[0].detach()))
        out.register_hook(lambda g: gradients.setdefault(name, []).append(rows(g)))

    for name, linear in linears.items():
        hooks.append(linear.module.register_forward_hook(lambda *call, name=name: keep(name, *call)))
    for row in TOKENS[:3]:
        (model(input_ids=row[None], labels=row[None], use_cache=False).loss * (len(row) - 1)).backward()
    for hook in hooks:
        hook.remove()
    found = {name: rest for name, *rest in curvature(model, blocks, TOKENS[:3], torch.device("cpu"))}
    assert found.keys() == linears.keys()
    for name, (weight, gram, squares) in found.items():
        assert torch.equal(weight, linears[name].weight.float())
        if name not in inputs:
            assert not gram.any() and not squares.any()
            continue
        every = torch.cat(inputs[name])
        torch.testing.assert_close(gram.double(), every.T @ every, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(squares.double(), torch.cat(gradients[name]).square().mean(0), rtol=1e-4, atol=1e-10)


def test_rows_count_by_their_importance():
    """A solver that weighs rows against one another spares those that count; a weight that stays is what it was."""
    pattern = Unstructured(0.5, row_factors(torch.tensor([1.0, 1.0, 4000.0, 1.0])))
    linear = nn.Linear(32, 4, bias=False)
    block = Block(0, "block", nn.ModuleDict({"linear": linear}))
    weight = linear.weight.detach().clone()
    stats = Stats(32)
    stats.add(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))

    def joint(weight, stats, pattern):
        return weight * pattern.keep(weight.abs(), per="matrix")

    OneShot(joint, {"block.linear": pattern})._solve(Team(), block, ["block.linear"], stats)
    kept = linear.weight != 0
    assert int((~kept).sum()) == 64 and kept[2].sum() > 24 and all(kept[row].sum() < 20 for row in (0, 1, 3))
    assert torch.equal(linear.weight[kept], weight[kept])
    assert str(pattern) == "50%" and Unstructured(0.5).scale(weight) is None
    assert row_factors(torch.zeros(2)) == (0.177, 0.177)


def test_a_rule_may_say_what_rows_count(allocate):
    def saying(importance):
        def rule(linears, sparsity, curvature):
            return Allocation(dict.fromkeys(linears, sparsity), {next(iter(linears)): importance})

        return allocate("60%", function=rule, seen={"curvature": []})

    outputs = SETTINGS["Llama"]["hidden_size"]
    first, *others = saying(torch.ones(outputs)).values()
    assert first.rows == (1.0,) * outputs and not any(pattern.rows for pattern in others)
    for wrong in (torch.ones(outputs + 1), -torch.ones(outputs), torch.full((outputs,), torch.nan)):
        with pytest.raises(ValueError, match="one number for each of its outputs"):
            saying(wrong)


def test_a_run_by_sensitivity(tmp_path):
    """Its patterns are of the whole, each linear has its own, and it beats one for all on text that it did not see."""
    asked = ["pattern=75%", "stages=[sparsegpt]", "evaluate.perplexity=[{source: python-docs, windows: 6}]"]
    found = {}
    for rule in ("uniform", "sensitivity"):
        (tmp_path / rule).mkdir()
        done = fit(recipe(tmp_path / rule), "--set", *asked, f"allocation={rule}", "keep=true")
        assert done.returncode == 0, done.stderr
        stored = tmp_path / rule / "run" / "blocks" / "allocation.json"
        found[rule] = json.loads((tmp_path / rule / "run" / "report.json").read_text())
    assert "for allocation by sensitivity" in done.stdout
    sizes = {len(rows) for _, *rows in json.loads(stored.read_text())["values"].values()}
    assert sizes == {64, 32, 160}  # rows of the linears of tiny-llama
    each = {name: value["sparsity"] for name, value in found["sensitivity"]["sparsity"]["per_linear"].items()}
    assert len(set(each.values())) > len(each) / 2
    assert found["sensitivity"]["sparsity"]["total"] == pytest.approx(0.75, abs=2e-3)
    quality = {rule: each["evaluation"]["pruned"]["perplexity"]["python-docs"] for rule, each in found.items()}
    assert quality["sensitivity"] < quality["uniform"]


def test_who_cannot_have_sensitivity(tmp_path):
    """A model without a next token, and one that a stage cuts before, are told before anything is read."""
    cut = ["stages=[{wanda-sp: {remove: 25%}}, wanda]", "pattern=50%"]
    done = fit(recipe(tmp_path), "--set", "allocation=sensitivity", *cut)
    assert done.returncode == 2 and "looks at the model as it begins, and a stage cuts it" in done.stderr
    images = ["calibration={source: images, path: x}", "stages=[wanda]", "pattern=50%", "evaluate={}"]
    done = fit(recipe(tmp_path, model=TINY.parent / "tiny-vit"), "--set", "allocation=sensitivity", *images)
    assert done.returncode == 2 and "follows the loss of the next token, and ViT" in done.stderr


def test_gradients_go_back_through_as_many_sequences_as_there_is_room_for():
    one = 64 * 4 * (4 + 4) * 128  # bytes of a sequence: width, float32, four blocks and what is on the way, tokens
    settings = {"config": SimpleNamespace(hidden_size=64), "dtype": torch.float32, "blocks": [None] * 4}
    tokens = torch.zeros(500, 128, dtype=torch.long)
    for room, expected in ((10**9, 256), (20 * one, 20), (one // 2, 1)):  # 256 x 128 are 32,768 tokens
        planned = SimpleNamespace(**settings, memory=(room, 0))
        assert there_and_back(planned, tokens) == expected
    long = SimpleNamespace(**settings, memory=(10**12, 0))
    assert there_and_back(long, torch.zeros(40, 4096, dtype=torch.long)) == 16
