import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation import (
    PCGrad,
    aggregate_weighted,
    combine_flat_grads,
    flat_to_grads,
    grads_to_flat,
)
from tolaria.aggregation.textbook import textbook_pcgrad

NOTHING = "^no gradients available for aggregation$"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
shares = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


def random_tensors(sizes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@given(sizes=st.lists(shapes, min_size=1, max_size=6), seed=seeds, dtype=st.sampled_from(DTYPES))
def test_gradients_come_back_from_the_vector(
    sizes: list[tuple[int, ...]], seed: int, dtype: torch.dtype
) -> None:
    grads = [grad.to(dtype) for grad in random_tensors(sizes, seed)]
    flat, kept = grads_to_flat(grads)
    assert flat.shape == (sum(math.prod(size) for size in sizes),)
    assert flat.dtype == dtype
    assert [tuple(shape) for shape in kept] == sizes
    back = flat_to_grads(flat, kept)
    torch.testing.assert_close(back, grads, rtol=0, atol=0)


def test_gradients_lie_end_to_end_in_order_whatever_their_strides() -> None:
    first = torch.arange(6.0).view(3, 2).T
    flat, kept = grads_to_flat([first, torch.tensor(9.0), torch.empty(0, 3), torch.tensor([7.0])])
    assert flat.tolist() == [0, 2, 4, 1, 3, 5, 9, 7]
    assert [tuple(shape) for shape in kept] == [(2, 3), (), (0, 3), (1,)]


@pytest.mark.parametrize("number", [1, 2])
def test_the_vector_is_a_copy_and_the_gradients_are_views_of_it(number: int) -> None:
    grads = [torch.ones(3) for _ in range(number)]
    flat, kept = grads_to_flat(grads)
    flat_to_grads(flat, kept)[0].fill_(2)
    assert flat[:3].tolist() == [2, 2, 2]
    assert grads[0].tolist() == [1, 1, 1]


def test_flattening_no_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=NOTHING):
        grads_to_flat([])


def test_flattening_two_dtypes_is_refused() -> None:
    message = r"gradient 1 is torch\.float64 on cpu, but gradient 0 is torch\.float32 on cpu"
    with pytest.raises(RuntimeError, match=message):
        grads_to_flat([torch.ones(2), torch.ones(2, dtype=torch.float64)])


def test_flattening_two_devices_is_refused() -> None:
    message = r"gradient 2 is torch\.float32 on meta, but gradient 0 is torch\.float32 on cpu"
    with pytest.raises(RuntimeError, match=message):
        grads_to_flat([torch.ones(2), torch.ones(3), torch.ones(1, device="meta")])


@pytest.mark.parametrize("sizes", [[], [(2, 2)], [(3,), (2, 2)], [(5,), (0,), ()]])
def test_shapes_that_do_not_fit_are_refused(sizes: list[tuple[int, ...]]) -> None:
    held = sum(math.prod(size) for size in sizes)
    with pytest.raises(RuntimeError, match=f"hold {held} elements, but the vector has 5; give the"):
        flat_to_grads(torch.ones(5), sizes)


@given(
    shape=shapes,
    weights=st.lists(shares, min_size=1, max_size=6).filter(any),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    tensor=st.booleans(),
)
def test_the_weighted_average_is_rounded_once(
    shape: tuple[int, ...], weights: list[float], seed: int, dtype: torch.dtype, tensor: bool
) -> None:
    grads = [grad.to(dtype) for grad in random_tensors([shape] * len(weights), seed)]
    given_weights = torch.tensor(weights, dtype=torch.float64)
    result = aggregate_weighted(grads, given_weights if tensor else weights)
    assert result.shape == shape
    assert result.dtype == dtype
    terms = [
        weight / math.fsum(weights) * grad.double()
        for weight, grad in zip(weights, grads, strict=True)
    ]
    exact = torch.stack(terms).sum(0)
    within = torch.float64 if dtype == torch.float64 else torch.float32
    slack = 8 * torch.finfo(within).eps * torch.stack(terms).abs().sum(0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + slack + smallest
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [100, 300])
def test_many_small_gradients_do_not_get_lost_in_half_precision(
    dtype: torch.dtype, number: int, device: str
) -> None:
    grads = [torch.ones(7, dtype=dtype, device=device)] * number
    result = aggregate_weighted(grads, [1.0] * number)
    assert result.dtype == dtype
    assert result.device.type == device
    assert result.tolist() == [1.0] * 7


def test_only_the_ratio_of_the_weights_counts() -> None:
    grads = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    assert aggregate_weighted(grads, [1, 3]).tolist() == [0.25, 0.75]
    assert aggregate_weighted(grads, [1e-300, 3e-300]).tolist() == [0.25, 0.75]
    assert aggregate_weighted(grads, torch.tensor([20, 60])).tolist() == [0.25, 0.75]
    assert aggregate_weighted(grads, [0, 0.1]).tolist() == [0, 1]


def test_averaging_leaves_the_gradients_as_they_are() -> None:
    grads = random_tensors([(3, 4)] * 3, 0)
    before = [grad.clone() for grad in grads]
    result = aggregate_weighted(grads, [1, 0, 0])
    result.fill_(5)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


@given(tasks=st.integers(1, 7), size=st.integers(0, 8), seed=seeds)
def test_combining_is_the_paper_on_whole_vectors(tasks: int, size: int, seed: int) -> None:
    flats = random_tensors([(size,)] * tasks, seed)
    result, conflicts = combine_flat_grads(flats, generator=torch.Generator().manual_seed(seed))
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(tasks).tolist()
    torch.testing.assert_close(result, textbook_pcgrad(flats, orders), rtol=1e-9, atol=1e-9)
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    assert conflicts == sum(float(flats[i] @ flats[j]) < 0 for i, j in pairs)


@given(weights=st.lists(shares, min_size=1, max_size=5).filter(any), seed=seeds)
def test_each_projected_gradient_counts_with_its_weight(weights: list[float], seed: int) -> None:
    tasks = len(weights)
    flats = random_tensors([(3,)] * tasks, seed)
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(tasks).tolist()
    expected = torch.zeros(3, dtype=torch.float64)
    for task, weight in enumerate(weights):
        # With nobody else to project, what is left is this one, projected.
        own = [orders[task] if one == task else [] for one in range(tasks)]
        others = torch.stack(flats).sum(0) - flats[task]
        expected += weight / math.fsum(weights) * (textbook_pcgrad(flats, own) - others)
    result, _ = combine_flat_grads(
        flats, weights=weights, generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@given(weights=st.lists(shares, min_size=1, max_size=5).filter(any), seed=seeds)
def test_without_projection_it_is_the_sum_or_the_average(weights: list[float], seed: int) -> None:
    flats = random_tensors([(4,)] * len(weights), seed)
    total, counted = combine_flat_grads(flats, use_pcgrad=False)
    torch.testing.assert_close(total, torch.stack(flats).sum(0))
    average, conflicts = combine_flat_grads(flats, use_pcgrad=False, weights=weights)
    torch.testing.assert_close(average, aggregate_weighted(flats, weights))
    # Conflicts are counted, if not resolved.
    assert conflicts == counted == combine_flat_grads(flats)[1]


def test_two_opposed_gradients_are_one_conflict() -> None:
    flats = [torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.2])]
    result, conflicts = combine_flat_grads(flats)
    assert conflicts == 1
    torch.testing.assert_close(result, textbook_pcgrad(flats, [[1], [0]]).float())
    assert combine_flat_grads(flats, use_pcgrad=False)[0].tolist() == pytest.approx([0.0, 0.4])


def test_the_order_of_projections_comes_from_the_generator() -> None:
    flats = random_tensors([(3,)] * 6, 1)
    before = torch.get_rng_state()
    results = [
        combine_flat_grads(flats, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(combine_flat_grads(flats)[0], results[0])
    assert torch.equal(combine_flat_grads(flats)[0], results[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_moves_on() -> None:
    flats, generator = random_tensors([(3,)] * 6, 1), torch.Generator().manual_seed(0)
    first, second = (combine_flat_grads(flats, generator=generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_pcgrad", [True, False])
@pytest.mark.parametrize("tasks", [1, 4])
def test_combining_leaves_the_vectors_as_they_are(use_pcgrad: bool, tasks: int) -> None:
    flats = random_tensors([(5,)] * tasks, 2)
    before = [flat.clone() for flat in flats]
    result, _ = combine_flat_grads(flats, use_pcgrad=use_pcgrad)
    result.fill_(5)
    assert all(torch.equal(flat, old) for flat, old in zip(flats, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_combining_keeps_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    flats = [torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0]), torch.tensor([0.0, 1.0])]
    result, conflicts = combine_flat_grads([flat.to(device, dtype) for flat in flats])
    assert (result.dtype, result.device.type) == (dtype, device)
    assert conflicts == 0
    assert result.tolist() == [-1.0, 8.0]


Combine = Callable[[Sequence[Tensor]], object]
both = pytest.mark.parametrize(
    "combine",
    [
        lambda grads: aggregate_weighted(grads, [1.0] * len(grads)),
        combine_flat_grads,
        lambda grads: combine_flat_grads(grads, use_pcgrad=False),
    ],
    ids=["aggregate_weighted", "combine_flat_grads", "without pcgrad"],
)


@both
def test_no_gradient_is_refused(combine: Combine) -> None:
    with pytest.raises(RuntimeError, match=NOTHING):
        combine([])


@both
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.ones(3), r"gradient 1 is float32 of shape \(3,\) on cpu, but gradient 0 is float32"),
        (torch.ones(1, 2), r"gradient 1 is float32 of shape \(1, 2\) on cpu, but"),
        (torch.ones(2).double(), r"gradient 1 is float64 of shape \(2,\) on cpu, but"),
        (torch.ones(2, device="meta"), r"gradient 1 is float32 of shape \(2,\) on meta, but"),
    ],
    ids=["size", "rank", "dtype", "device"],
)
def test_gradients_that_differ_are_refused(combine: Combine, other: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{message}.*give all one shape, one dtype and one dev"):
        combine([torch.ones(2), other, torch.ones(2)])


@both
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_cpu_and_cuda_are_refused(combine: Combine) -> None:
    with pytest.raises(RuntimeError, match=r"gradient 1 is float32 of shape \(2,\) on cuda:0, but"):
        combine([torch.ones(2), torch.ones(2, device="cuda")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flattening_from_cpu_and_cuda_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"gradient 1 is torch\.float32 on cuda:0"):
        grads_to_flat([torch.ones(2), torch.ones(2, device="cuda")])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "sum to zero; give one above zero"),
        ([1.0, -1.0], "weight 1 is -1.0; give a finite one, 0 or more"),
        ([math.nan, 1.0], "weight 0 is nan"),
        ([1.0, math.inf], "weight 1 is inf"),
        ([1.0], "1 weights were given for 2 tasks"),
        ([1.0, 1.0, 1.0], "3 weights were given for 2 tasks"),
        ([], "0 weights were given for 2 tasks"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    grads = [torch.ones(2), torch.ones(2)]
    with pytest.raises(RuntimeError, match=message):
        aggregate_weighted(grads, weights)
    with pytest.raises(RuntimeError, match=message):
        aggregate_weighted(grads, torch.tensor(weights))
    for use_pcgrad in (True, False):
        with pytest.raises(RuntimeError, match=message):
            combine_flat_grads(grads, weights=weights, use_pcgrad=use_pcgrad)


def test_preferences_have_all_digits_of_float64() -> None:
    flats = [torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    for use_pcgrad in (False, True):
        combined, _ = combine_flat_grads(flats, use_pcgrad=use_pcgrad, weights=[1, 2])
        assert combined.tolist() == pytest.approx([1 / 3] * 2, rel=1e-15)


@pytest.mark.parametrize("weights", [torch.tensor(1.0), torch.ones(1, 1)])
def test_weights_of_another_rank_are_refused(weights: Tensor) -> None:
    with pytest.raises(RuntimeError, match="give one for each gradient"):
        aggregate_weighted([torch.ones(2)], weights)
