import doctest

import pytest
import torch

import sparsekit.maths.pattern
from sparsekit.maths import NM, Unstructured, lift, parse, slide


def lowest_by_sorting(scores: list[float], count: int) -> list[bool]:
    """Oracle: the mask of what stays of a flat list; sorted() is stable, so equal scores go from the left."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    return [i not in order[:count] for i in range(len(scores))]


def test_doctests():
    assert doctest.testmod(sparsekit.maths.pattern).failed == 0


@pytest.mark.parametrize(
    ("sparsity", "total", "count"),
    [(0.29, 100, 29), (0.7, 10, 7), (0.57, 100, 57), (0.5, 3, 1), (0.0, 9, 0), (0.999, 10, 9), (1e-5, 100, 0)],
)
def test_counts_are_exact_and_never_more(sparsity, total, count):
    assert Unstructured(sparsity).pruned(total) == count
    kept = Unstructured(sparsity).keep(torch.rand(1, total))
    assert (~kept).sum() == count


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_unstructured_against_sorting(levels, sparsity):
    pattern, score = Unstructured(sparsity), torch.randint(0, levels, (7, 11)).float()
    rows = [lowest_by_sorting(row, pattern.pruned(11)) for row in score.tolist()]
    assert pattern.keep(score).tolist() == rows
    assert pattern.keep(score, per="matrix").flatten().tolist() == lowest_by_sorting(
        score.flatten().tolist(), pattern.pruned(77)
    )
    kept = pattern.keep(score, per=4)  # blocks of 4, 4 and 3 columns
    for part, mask in zip(score.split(4, 1), kept.split(4, 1), strict=True):
        flat = part.flatten().tolist()
        assert mask.flatten().tolist() == lowest_by_sorting(flat, pattern.pruned(len(flat)))


@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (4, 8), (8, 16), (3, 32)])
def test_groups_against_sorting(levels, keep, group):
    score = torch.randint(0, levels, (5, 3 * group)).float()
    groups = [lowest_by_sorting(g, group - keep) for g in score.reshape(-1, group).tolist()]
    kept = NM(keep, group).keep(score)
    assert kept.reshape(-1, group).tolist() == groups
    assert NM(keep, group).keep(score.t().contiguous().t(), per="matrix").equal(kept)  # another memory order


def test_all_scores_equal_prunes_the_earliest():
    assert Unstructured(0.5).keep(torch.zeros(2, 4)).tolist() == [[False, False, True, True]] * 2
    assert Unstructured(0.5).keep(torch.zeros(2, 4), per="matrix").tolist() == [[False] * 4, [True] * 4]


def test_infinite_scores_are_ordered_and_nan_is_refused():
    inf = float("inf")
    score = torch.tensor([[inf, -inf, 0.0, -inf]])
    assert Unstructured(0.5).keep(score).tolist() == [[True, False, True, False]]
    assert NM(1, 4).keep(score).tolist() == [[True, False, False, False]]
    for pattern in (Unstructured(0.0), NM(2, 4)):
        with pytest.raises(ValueError, match="NaN"):
            pattern.keep(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type(dtype):
    score = torch.arange(16).reshape(2, 8).to(dtype)
    for pattern in (Unstructured(0.5), NM(2, 4), NM(1, 2)):
        assert (~pattern.keep(score)).sum() == 8


def test_values_compare_hash_and_print():
    assert NM(2, 4) == NM(keep=2, group=4) != NM(1, 2)
    assert {Unstructured(0.5), Unstructured(sparsity=0.5), NM(2, 4), NM(2, 4)} == {Unstructured(0.5), NM(2, 4)}
    assert Unstructured(0.5) != NM(2, 4)
    for text in ("0%", "0.1%", "29%", "33.3%", "62.5%", "70%", "99.99%", "2:4", "1:32"):
        assert str(parse(text)) == text
        assert parse(parse(text)) == parse(text)
    with pytest.raises(AttributeError):
        NM(2, 4).group = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("50", '"50%"'),
        (50, '"50%"'),
        (1, '"1%"'),
        ("62.5", '"62.5%"'),
        ("3:2", "below the second"),
        ("4:4", "below the second"),
        ("0:4", "at least 1"),
        ("100%", "less than 100%"),
        ("-5%", "at least 0%"),
        (-0.5, "at least 0%"),
        ("nan", "not understood"),
        ("half", "not understood"),
        ("2:4:8", "not understood"),
        ("", "not understood"),
    ],
)
def test_mistakes_are_answered(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(("text", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("50%", 0.5), (0.3, 0.3), ("1e-4", 1e-4)])
def test_parse(text, sparsity):
    assert parse(text).sparsity == sparsity


def test_check_names_layer_width_and_what_fits():
    NM(2, 4).check(8, "q_proj")
    Unstructured(0.5).check(7, "q_proj")
    with pytest.raises(ValueError, match=r"down_proj has 30 input columns.*1:2, 3:6, 5:10, 15:30"):
        NM(2, 4).check(30, "down_proj")
    with pytest.raises(ValueError, match=r"groups of 3, 9, 27 would"):
        NM(2, 4).check(27, "fc1")
    with pytest.raises(ValueError, match=r"no group from 2 to 64"):
        NM(2, 4).check(101, "fc1")
    with pytest.raises(ValueError, match="10 input columns"):
        NM(2, 4).keep(torch.rand(2, 10))


@pytest.mark.parametrize("per", ["column", 0, -4, True, 1.5])
def test_scope_is_checked(per):
    with pytest.raises(ValueError, match="per is"):
        Unstructured(0.5).keep(torch.rand(2, 4), per=per)


def test_satisfied_counts_the_scope():
    weight = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]])
    assert Unstructured(0.5).satisfied(weight, per="row") and Unstructured(0.5).satisfied(weight, per="matrix")
    assert not Unstructured(0.5).satisfied(weight, per=4)  # the last four columns have two zeros of eight
    assert not NM(2, 4).satisfied(weight) and NM(2, 4).satisfied(weight[1:])
    assert not Unstructured(0.6).satisfied(weight, per="matrix") and not NM(2, 5).satisfied(weight)
    assert Unstructured(0.25).satisfied(weight, per=4)


@pytest.mark.parametrize("text", ["4:6", "6:8", "8:10", "10:12"])
@pytest.mark.parametrize("width", [120, 124, 121])
def test_windows_of_two_of_four_give_what_the_weight_gives(text, width):
    """slide(W) lift(x) = W x exactly: whole numbers, of which every sum is exact; every window is 2:4."""
    pattern = parse(text)
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-9, 10, (7, width), generator=random).double()
    weight = weight * pattern.keep(weight.abs() + torch.rand(weight.shape, generator=random))
    inputs = torch.randint(-9, 10, (5, width), generator=random).double()
    slid, lifted = slide(weight, pattern), lift(inputs, pattern)
    assert NM(2, 4).satisfied(slid)
    assert torch.equal(lifted @ slid.t(), inputs @ weight.t())
    assert int(slid.count_nonzero()) == int(weight.count_nonzero())  # every weight in one window
    whole = width - width % pattern.group
    assert slid.shape[1] == whole // pattern.group * (pattern.group // 2 - 1) * 4 + 4 * -(-(width - whole) // 2)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(6, 8, pairs=True), NM(5, 7)])
def test_other_patterns_are_no_windows(pattern):
    with pytest.raises(ValueError, match="is not all but two of an even group"):
        slide(torch.zeros(2, 56), pattern)
    with pytest.raises(ValueError, match="is not 6:8"):
        slide(torch.ones(2, 16), NM(6, 8))


def test_a_last_group_that_is_not_full_stays_dense():
    pattern, weight = NM(8, 10), torch.randn(4, 576)
    kept = pattern.keep(weight.abs())
    assert kept[:, 570:].all() and int((~kept).sum()) == 4 * 57 * 2
    assert pattern.satisfied(weight * kept) and not pattern.satisfied(weight)
    pattern.check(576, "q_proj")
    with pytest.raises(ValueError, match="has 576 input columns, which groups of 10"):
        NM(5, 10).check(576, "q_proj")  # no hardware's windows: only whole groups


def test_pairs_stay_or_go_together():
    pattern, score = parse("4:8p"), torch.rand(6, 32)
    kept = pattern.keep(score)
    assert torch.equal(kept[:, ::2], kept[:, 1::2])
    sums = score.view(6, 4, 4, 2).sum(3)
    assert torch.equal(kept[:, ::2].view(6, 4, 4), sums >= sums.sort(2).values[:, :, 2:3])
    weight = torch.randn(6, 32) * kept
    assert pattern.satisfied(weight) and NM(4, 8).satisfied(weight)
    singles = torch.randn(6, 32) * NM(4, 8).keep(score)
    assert not pattern.satisfied(singles)
    assert str(pattern) == "4:8p" and parse(str(pattern)) == pattern != NM(4, 8)
    with pytest.raises(ValueError, match="both numbers must be even"):
        parse("3:8p")
