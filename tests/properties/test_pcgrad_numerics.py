"""Task space against the paper's algorithm on whole vectors in float64, on hard gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation import PCGrad, kernels
from tolaria.aggregation.textbook import textbook_pcgrad

SIZES = (3, 64, 700, 5000)


def gradients(kind: str, tasks: int, size: int, seed: int) -> Tensor:
    """Return tasks by size, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    signs = torch.tensor([(-1.0) ** task for task in range(tasks)]).double().unsqueeze(1)
    powers = torch.rand(tasks, 1, generator=generator, dtype=torch.float64)
    kinds = {
        "random": noise,
        "nearly parallel": common + 1e-6 * noise,
        "nearly opposite, 1e-1": signs * common + 1e-1 * noise,
        "nearly opposite, 1e-3": signs * common + 1e-3 * noise,
        "nearly opposite, 1e-6": signs * common + 1e-6 * noise,
        "duplicates": common.expand(tasks, size).clone(),
        "some zero": noise * (powers > 0.5),
        "few directions": noise[:, :2] @ torch.randn(2, size, generator=generator).double(),
        "tiny": noise * 1e-20,
        "huge": noise * 1e20 / size**0.5,
        "scales from 1e-20 to 1e18": noise * 10 ** (38 * powers - 20),
        "opposite, scales from 1e-4 to 1e4": (signs * common + 1e-2 * noise)
        * 10 ** (8 * powers - 4),
    }
    return kinds[kind]


KINDS = (
    "random",
    "nearly parallel",
    "nearly opposite, 1e-1",
    "nearly opposite, 1e-3",
    "nearly opposite, 1e-6",
    "duplicates",
    "some zero",
    "few directions",
    "tiny",
    "huge",
    "scales from 1e-20 to 1e18",
    "opposite, scales from 1e-4 to 1e4",
)


def in_task_space(rows: Tensor, seed: int) -> Tensor:
    """Aggregate as ``backward`` does: the gradients in two parameters each."""
    half = rows.shape[1] // 2
    parts: list[list[Tensor | None]] = [[row[:half].clone(), row[half:].clone()] for row in rows]
    selection = kernels.select(parts, [0, 1])
    weights = PCGrad(torch.Generator().manual_seed(seed)).weights(selection.gramian())
    return torch.cat(selection.combine(weights))


def textbook(rows: Tensor, seed: int) -> Tensor:
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(len(rows))
    return textbook_pcgrad(list(rows), orders.tolist())


def assert_agrees(rows: Tensor, seed: int) -> None:
    result, expected = in_task_space(rows, seed), textbook(rows, seed)
    largest = rows.double().norm(dim=1).max()
    # What no algorithm can avoid: the result is written in the dtype of the gradients.
    rounding = torch.finfo(rows.dtype).eps / 2 * expected.norm()
    assert (result.double() - expected).norm() <= 1e-6 * largest + rounding


@settings(max_examples=40)
@pytest.mark.parametrize("kind", KINDS)
@given(
    tasks=st.integers(1, 64),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
)
def test_it_agrees_with_the_paper_to_a_millionth_of_the_largest_gradient(
    kind: str, tasks: int, size: int, seed: int
) -> None:
    # The vector form takes n squared passes over everything.
    size = min(size, 64_000 // tasks**2 + 3)
    assert_agrees(gradients(kind, tasks, size, seed).float(), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_for_sixty_four_tasks_of_many_elements(kind: str) -> None:
    assert_agrees(gradients(kind, 64, 2000, 1).float(), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*KINDS[:8], "opposite, scales from 1e-4 to 1e4"])
@pytest.mark.parametrize("tasks", [2, 8, 17])
def test_half_precision_gradients_lose_nothing_but_the_last_rounding(
    dtype: torch.dtype, kind: str, tasks: int
) -> None:
    rows = gradients(kind, tasks, 3000, 2)
    rows = (rows / rows.abs().max().clamp(min=1e-30)).to(dtype)
    result, expected = in_task_space(rows, 3), textbook(rows, 3)
    largest = rows.double().norm(dim=1).max()
    # Below its smallest normal number float16 rounds to fixed steps.
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    unit = torch.finfo(dtype).eps / 2
    off = (result.double() - expected).abs()
    assert (off <= unit * expected.abs() + step + 1e-6 * largest).all()


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), tasks=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_the_error_relative_to_the_result_grows_with_cancellation_alone(
    kind: str, tasks: int, seed: int
) -> None:
    """The bound that docs/aggregation.md gives: a few roundings times the amplification."""
    rows = gradients(kind, tasks, 300, seed).float()
    selection = kernels.select([[row] for row in rows], [0])
    gramian = selection.gramian()
    weights = PCGrad(torch.Generator().manual_seed(seed)).weights(gramian)
    expected = textbook(rows, seed)
    terms = float(weights.abs() @ rows.double().norm(dim=1))
    off = float((selection.combine(weights)[0].double() - expected).norm())
    assert off <= 1e-6 * max(terms, float(expected.norm()))
