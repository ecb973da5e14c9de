import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation import kernels

Rows = Sequence[kernels.Row]
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
HALVES = [torch.bfloat16, torch.float16]
SIZES = [(1,), (3, 5), (16,), (64, 65), (4096,), (4097,), (0,), (2, 9000)]


def random_rows(
    tasks: int,
    sizes: list[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(size, generator=generator).double() * scale).to(device, dtype)
            for size in sizes
        ]
        for _ in range(tasks)
    ]


def matrix(rows: Rows) -> Tensor:
    """Return the rows as one float64 matrix on the CPU; None counts as zeros."""
    samples = [next(g for g in column if g is not None) for column in zip(*rows, strict=True)]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(sample) if gradient is None else gradient).flatten()
                    for gradient, sample in zip(row, samples, strict=True)
                ]
            )
            for row in rows
        ]
    ).to("cpu", torch.float64)


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).to("cpu", torch.float64)


def assert_gramian(rows: Rows, relative: float) -> None:
    exact = matrix(rows)
    gramian = kernels.select(rows, range(len(rows[0]))).gramian()
    assert gramian.dtype == torch.float64
    norms = exact.norm(dim=1)
    off = (gramian.cpu() - exact @ exact.T).abs()
    assert (off <= relative * torch.outer(norms, norms)).all(), off.max()


def assert_combination(rows: Rows, weights: Tensor, unit: float) -> None:
    """Compare with float64; the result is rounded once, to the dtype of the gradients."""
    selection = kernels.select(rows, range(len(rows[0])))
    gramian = selection.gramian()
    result = flat(selection.combine(weights.to(gramian)))
    exact = matrix(rows)
    expected = weights.double() @ exact
    # Added up in float64 on the CPU, in float32 elsewhere.
    slack = (1e-12 if gramian.device.type == "cpu" else 1e-7 * len(rows)) * (
        weights.double().abs() @ exact.abs()
    )
    assert ((result - expected).abs() <= unit * expected.abs() + slack).all()


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 8, 17, 33])
def test_the_gramian_is_that_of_float64(tasks: int, kernels_in_use: str, device: str) -> None:
    assert_gramian(random_rows(tasks, SIZES, device=device), 2e-7)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 32])
def test_the_combination_is_that_of_float64(tasks: int, kernels_in_use: str, device: str) -> None:
    weights = torch.linspace(-2, 3, tasks, dtype=torch.float64)
    assert_combination(random_rows(tasks, SIZES, device=device), weights, 2**-24)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_other_types_are_widened_and_rounded_once(
    dtype: torch.dtype, kernels_in_use: str, device: str
) -> None:
    rows = random_rows(5, SIZES, dtype=dtype, device=device)
    assert_gramian(rows, 1e-12)
    weights = torch.tensor([0.3, -1.7, 0.01, 2.5, -0.4], dtype=torch.float64)
    assert_combination(rows, weights, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-37, 1e20, 1e35])
def test_no_scale_of_float32_over_or_underflows(
    scale: float, kernels_in_use: str, device: str
) -> None:
    rows = random_rows(3, [(100,), (5000,)], scale=scale, device=device)
    assert_gramian(rows, 2e-7)


def test_one_small_gradient_among_large_ones_keeps_its_norm(kernels_in_use: str) -> None:
    large, small = random_rows(2, [(300,)]), random_rows(1, [(300,)], scale=1e-25, seed=1)
    assert_gramian([*large, *small], 2e-7)


@FIXTURE
@given(
    tasks=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    absent=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 5))),
    seed=st.integers(0, 2**31),
)
def test_an_absent_gradient_counts_as_zeros(
    kernels_in_use: str,
    tasks: int,
    sizes: list[int],
    absent: set[tuple[int, int]],
    seed: int,
) -> None:
    rows = random_rows(tasks, [(size,) for size in sizes], seed=seed)
    for task, column in absent:
        if 0 < task < tasks and column < len(sizes):
            rows[task][column] = None
    assert_gramian(rows, 2e-7)
    assert_combination(rows, torch.linspace(1, 2, tasks, dtype=torch.float64), 2**-24)


def test_the_first_task_may_be_the_absent_one(kernels_in_use: str) -> None:
    rows = random_rows(3, [(4,), (6,)])
    rows[0][1] = None
    assert_gramian(rows, 2e-7)
    assert_combination(rows, torch.ones(3, dtype=torch.float64), 2**-24)


def test_the_sum_is_added_to_what_is_given(kernels_in_use: str) -> None:
    rows = random_rows(2, [(3, 4), (7,)])
    into = [torch.ones(3, 4), None]
    selection = kernels.select(rows, [0, 1])
    first, second = selection.combine(torch.ones(2, dtype=torch.float64), into)
    assert first is into[0]
    torch.testing.assert_close(first, 1 + rows[0][0] + rows[1][0])  # type: ignore[operator]
    torch.testing.assert_close(second, rows[0][1] + rows[1][1])  # type: ignore[operator]


@pytest.mark.parametrize(
    "into",
    [
        torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.ones(2, 3, 4, 5, dtype=torch.float64),
    ],
    ids=["other strides", "other dtype"],
)
def test_what_is_given_may_be_laid_out_differently(into: Tensor, kernels_in_use: str) -> None:
    rows = random_rows(2, [(2, 3, 4, 5)])
    expected = into.double() + flat([rows[0][0], rows[1][0]]).view(2, 2, 3, 4, 5).sum(0)  # type: ignore[list-item]
    (result,) = kernels.select(rows, [0]).combine(torch.ones(2, dtype=torch.float64), [into])
    assert result is into
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_not_changed(kernels_in_use: str) -> None:
    rows = random_rows(3, SIZES)
    before = matrix(rows)
    selection = kernels.select(rows, range(len(SIZES)))
    selection.gramian()
    selection.combine(torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(matrix(rows), before)


def test_several_dtypes_are_taken_together(kernels_in_use: str) -> None:
    single, half = random_rows(3, [(40,)]), random_rows(3, [(30,)], dtype=torch.bfloat16)
    rows = [[h[0], s[0], h[0]] for s, h in zip(single, half, strict=True)]
    assert_gramian(rows, 2e-7)
    sums = kernels.select(rows, [0, 1, 2]).combine(torch.ones(3, dtype=torch.float64))
    assert [part.dtype for part in sums] == [torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(sums[1], torch.stack([s[0] for s in single]).sum(0))  # type: ignore[arg-type]


def test_nan_and_infinity_are_passed_on(kernels_in_use: str) -> None:
    rows = random_rows(3, [(5000,)])
    rows[1][0][4500] = math.inf  # type: ignore[index]
    gramian = kernels.select(rows, [0]).gramian()
    assert gramian.diagonal().isfinite().tolist() == [True, False, True]
    assert gramian[0, 2].isfinite()


@pytest.mark.parametrize("layout", ["transposed", "channels last", "sliced", "expanded"])
def test_gradients_with_gaps_or_another_order_are_laid_out_anew(
    layout: str, kernels_in_use: str
) -> None:
    plain = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    other = {
        "transposed": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([plain, plain], dim=1)[:, :6],
        "expanded": plain[:, :1].expand(4, 6, 3, 3),
    }[layout]
    for pair in ([[plain], [other]], [[other], [plain]], [[other], [other * 2]]):
        rows = kernels.dense(pair)
        assert_gramian(rows, 2e-7)
        (result,) = kernels.select(rows, [0]).combine(torch.tensor([1.0, 3.0]).double())
        torch.testing.assert_close(result, pair[0][0] + 3 * pair[1][0])


def test_channels_last_stays_channels_last() -> None:
    last = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    rows = kernels.dense([[last], [last]])
    (result,) = kernels.select(rows, [0]).combine(torch.ones(2, dtype=torch.float64))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_sparse_gradients_are_refused() -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 is sparse.*sparse=False"):
        kernels.dense([[torch.ones(2), torch.ones(3, 3)], [None, sparse]])


def test_complex_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match="complex64"):
        kernels.select([[torch.ones(2, dtype=torch.complex64)]], [0])


def test_gradients_on_two_devices_are_refused() -> None:
    rows = [[torch.ones(2), torch.ones(2, device="meta")]]
    with pytest.raises(RuntimeError, match=r"on meta, that of parameter 0 on cpu"):
        kernels.select(rows, [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_cpu_and_cuda_are_refused() -> None:
    rows = [[torch.ones(2), torch.ones(2, device="cuda")]]
    with pytest.raises(RuntimeError, match="aggregate the parameters of each device apart"):
        kernels.select(rows, [0, 1])


def test_a_parameter_that_no_task_reaches_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no gradients available for aggregation of parameter 0"):
        kernels.select([[None], [None]], [0])


def test_more_tasks_than_the_compiled_kernels_take_are_left_to_torch() -> None:
    assert_gramian(random_rows(140, [(50,)]), 2e-7)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        rows = random_rows(3, [(70_000,), (5,), (30_011,)])
        assert_gramian(rows, 2e-7)
        assert_combination(rows, torch.tensor([1.0, -2.0, 0.5]), 2**-24)
    finally:
        torch.set_num_threads(before)


def test_a_negative_view_is_read_with_its_sign(kernels_in_use: str) -> None:
    rows = kernels.dense([[torch._neg_view(torch.arange(3.0))], [torch.ones(3)]])
    assert kernels.select(rows, [0]).gramian().tolist() == [[5, -3], [-3, 3]]


def test_the_sum_carries_no_graph(kernels_in_use: str) -> None:
    rows = [[torch.ones(3, requires_grad=True) * 2], [torch.ones(3, requires_grad=True)]]
    selection = kernels.select(rows, [0])
    assert not selection.gramian().requires_grad
    assert not selection.combine(torch.ones(2, dtype=torch.float64))[0].requires_grad
