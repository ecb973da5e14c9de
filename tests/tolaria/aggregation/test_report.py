import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation import ConflictReport

TASKS = ("a", "b", "c", "d", "e", "f")


def report_of(rows: Tensor, weights: list[float] | None = None) -> ConflictReport:
    rows = rows.double()
    return ConflictReport(
        TASKS[: len(rows)], rows @ rows.T, torch.tensor(weights or [1.0] * len(rows)).double()
    )


def of_gramian(
    gramian: list[list[float]], squares_apart: list[float] | None = None
) -> ConflictReport:
    return ConflictReport(
        TASKS[: len(gramian)],
        torch.tensor(gramian, dtype=torch.float64),
        torch.ones(len(gramian), dtype=torch.float64),
        squares_apart=None if squares_apart is None else torch.tensor(squares_apart).double(),
    )


def random_rows(tasks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (6 * torch.rand(tasks, 1, generator=generator).double() - 3)
    return torch.randn(tasks, 4, generator=generator).double() * scales


any_rows = st.builds(random_rows, st.integers(1, 6), st.integers(0, 2**31))


@given(rows=any_rows)
def test_conflicts_are_the_pairs_with_a_negative_product(rows: Tensor) -> None:
    report = report_of(rows)
    tasks = len(rows)
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    conflicts = sum(float(rows[i] @ rows[j]) < 0 for i, j in pairs)
    assert report.num_tasks == tasks
    assert report.conflicts == conflicts
    assert report.conflict_rate * max(1, tasks - 1) == pytest.approx(conflicts)
    assert report.conflict_share * max(1, len(pairs)) == pytest.approx(conflicts)
    assert 0 <= report.conflict_share <= 1


@given(rows=any_rows)
def test_norms_and_cosines_are_those_of_the_gradients(rows: Tensor) -> None:
    report = report_of(rows)
    torch.testing.assert_close(report.norms, rows.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(rows.unsqueeze(0), rows.unsqueeze(1), dim=2)
    torch.testing.assert_close(report.cosine, expected)
    assert report.cosine.abs().max() <= 1
    assert report.cosines() == {
        f"{TASKS[i]}|{TASKS[j]}": pytest.approx(float(expected[i, j]))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
    }


def test_orthogonal_gradients_are_not_in_conflict() -> None:
    report = report_of(torch.tensor([[1, 0], [0, 1]]))
    assert report.conflicts == report.conflict_rate == report.conflict_share == 0


def test_all_of_three_may_disagree() -> None:
    report = of_gramian([[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]])
    assert (report.conflicts, report.conflict_rate, report.conflict_share) == (3, 1.5, 1.0)


def test_one_task_has_nothing_to_conflict_with() -> None:
    report = of_gramian([[4.0]])
    assert (report.conflicts, report.conflict_rate, report.conflict_share) == (0, 0.0, 0.0)
    assert report.norms.tolist() == [2.0]
    assert report.cosines() == {}


def test_the_cosine_with_a_zero_gradient_is_zero() -> None:
    report = report_of(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]]))
    assert report.cosine.tolist() == [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]
    assert report.cosines() == {"a|b": 0.0, "a|c": -1.0, "b|c": 0.0}
    assert report.conflicts == 1


def test_rounding_takes_no_cosine_out_of_its_range() -> None:
    report = of_gramian([[1, 1 + 1e-12], [1 + 1e-12, 1]])
    assert report.cosines() == {"a|b": 1.0}
    report = of_gramian([[1, -1 - 1e-12], [-1 - 1e-12, 1]])
    assert report.cosines() == {"a|b": -1.0}


def test_a_gradient_that_is_not_finite_is_named() -> None:
    assert of_gramian([[1, 0, 0], [0, 2, 0], [0, 0, 3]]).nonfinite == ()
    nan, inf = math.nan, math.inf
    report = of_gramian([[inf, inf, nan], [inf, 2, nan], [nan, nan, nan]])
    assert report.nonfinite == ("a", "c")


def test_a_gradient_that_is_not_finite_in_its_own_part_is_named() -> None:
    gramian = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, math.inf]]
    assert of_gramian(gramian, [1.0, 2.0, 3.0]).nonfinite == ("c",)
    assert of_gramian(gramian, [math.nan, 2.0, 3.0]).nonfinite == ("a", "c")
    assert of_gramian(gramian, [1.0, math.inf, 3.0]).nonfinite == ("b", "c")


def test_parallel_gradients_are_not_amplified() -> None:
    report = report_of(torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.5, 1.0]]), [0.2, 5.0, 1.0])
    assert float(report.amplification) == pytest.approx(1.0)


@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([1e-1, 1e-3, 1e-5]))
def test_nearly_opposed_gradients_are_amplified(seed: int, epsilon: float) -> None:
    row = random_rows(1, seed)
    report = report_of(torch.cat([row, -(1 - epsilon) * row]))
    assert float(report.amplification) == pytest.approx((2 - epsilon) / epsilon, rel=1e-3)


@given(rows=any_rows, data=st.data())
def test_the_amplification_is_that_of_the_weighted_gradients(
    rows: Tensor, data: st.DataObject
) -> None:
    weights = data.draw(
        st.lists(st.floats(0.1, 10), min_size=len(rows), max_size=len(rows)), label="weights"
    )
    signs = [weight * (-1) ** index for index, weight in enumerate(weights)]
    for vector in (weights, signs):
        weighted = rows * torch.tensor(vector).double().unsqueeze(1)
        expected = weighted.norm(dim=1).sum() / weighted.sum(0).norm()
        amplification = report_of(rows, vector).amplification
        torch.testing.assert_close(amplification, expected, rtol=1e-6, atol=0)
        assert amplification >= 1 - 1e-9


def test_gradients_that_cancel_leave_an_infinite_amplification() -> None:
    assert float(of_gramian([[1, -1], [-1, 1]]).amplification) == math.inf


def test_rounding_leaves_no_negative_square_in_the_amplification() -> None:
    gramian = [[1.0, -1 - 1e-15], [-1 - 1e-15, 1.0]]
    assert float(of_gramian(gramian).amplification) == math.inf


def test_the_weights_of_groups_are_averaged_in_the_amplification() -> None:
    gramian = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 4.0], [2.0, 0.0], [3.0, 2.0]], dtype=torch.float64)
    grouped = ConflictReport(("a", "b"), gramian, weights)
    whole = ConflictReport(("a", "b"), gramian, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert grouped.amplification.shape == ()
    torch.testing.assert_close(grouped.amplification, whole.amplification)
    expected = (2 * math.sqrt(2) + 2 * math.sqrt(3)) / math.sqrt(4 * (2 + 3 - 2))
    assert float(whole.amplification) == pytest.approx(expected)


def test_a_gradient_that_is_not_finite_has_no_cosine() -> None:
    gramian = torch.tensor([[math.nan, 0.0], [0.0, 1.0]]).double()
    report = ConflictReport(("a", "b"), gramian, torch.ones(2).double())
    assert report.cosine.isnan().tolist() == [[True, True], [True, False]]


def test_nothing_is_amplified_where_all_gradients_are_zero() -> None:
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert ConflictReport(("a", "b"), zeros, torch.ones(2).double()).amplification == 1
