import entrypoints
import torch
from sparsekit.maths import NM, Stats, Unstructured
from sparsekit.testing import check_solver

from sparsekit_ria import ria


def test_contract():
    check_solver(ria)


def test_installed_under_its_name():
    assert entrypoints.get_group_named("sparsekit.solvers")["ria"].load() is ria


def test_formula_on_a_matrix_done_by_hand():
    weight = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    stats = Stats.of(torch.tensor([[16.0, 0.0], [0.0, 1.0]]))  # norms 16 and 1
    # relative: 1/4 + 1/5, 4/6 + 4/5 | 3/4 + 3/5, 2/6 + 2/5; times the root of the norm, 4 and 1: 1.8, 1.47 | 5.4, 0.73
    assert ria(weight, stats, Unstructured(0.5)).tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert ria(weight, stats, Unstructured(0.5), power=0).tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert ria(weight, stats, NM(1, 2)).tolist() == [[1.0, 0.0], [3.0, 0.0]]


def test_rows_and_columns_of_zeros():
    weight = torch.randn(8, 8)
    weight[2] = 0
    weight[:, 5] = 0
    answer = ria(weight, Stats.of(torch.randn(16, 8)), Unstructured(0.5))
    assert answer.isfinite().all() and (answer == 0).sum() == 32
