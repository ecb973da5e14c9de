import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation.factors import EmbeddingFactors, Factors, LinearFactors

WEIGHTS = torch.tensor([0.5, -2.0, 3.0, 0.25, 1.5]).double()


def linear(tasks: int, rows: int, seed: int) -> tuple[LinearFactors, Tensor]:
    """Return factors, and the gradients that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 7, generator=generator)
    outputs = [torch.randn(rows, 5, generator=generator) for _ in range(tasks)]
    formed = torch.stack([gradient.double().T @ inputs.double() for gradient in outputs])
    return LinearFactors(inputs, outputs, torch.Size((5, 7))), formed


def embedding(tasks: int, rows: int, seed: int, padding: int) -> tuple[EmbeddingFactors, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(11, 4)
    indices = torch.randint(0, 11, (rows,), generator=generator)
    outputs = [torch.randn(rows, 4, generator=generator) for _ in range(tasks)]
    formed = torch.zeros(tasks, 11, 4, dtype=torch.float64)
    for task, gradient in enumerate(outputs):
        for index, row in zip(indices.tolist(), gradient, strict=True):
            if index != padding:
                formed[task, index] += row.double()
    return EmbeddingFactors(table, padding, indices, outputs), formed


def assert_stands_for(factors: Factors, formed: Tensor) -> None:
    tasks = len(formed)
    flat = formed.flatten(1)
    torch.testing.assert_close(factors.gramian(), flat @ flat.T, rtol=1e-6, atol=1e-12)
    expected = torch.einsum("t,tij->ij", WEIGHTS[:tasks], formed)
    found = factors.combine(WEIGHTS[:tasks], None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    into = torch.ones_like(found)
    assert factors.combine(WEIGHTS[:tasks], into) is into
    torch.testing.assert_close(into, found + 1)


@given(tasks=st.integers(1, 5), rows=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_a_linear_layer(tasks: int, rows: int, seed: int) -> None:
    assert_stands_for(*linear(tasks, rows, seed))


@given(
    tasks=st.integers(1, 5),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    padding=st.sampled_from([-1, 0, 3]),
)
def test_an_embedding(tasks: int, rows: int, seed: int, padding: int) -> None:
    assert_stands_for(*embedding(tasks, rows, seed, padding))


def test_a_wide_layer_is_worked_on_in_slices() -> None:
    inputs = torch.randn(64, 30)
    outputs = [torch.randn(64, 1500) for _ in range(2)]
    formed = torch.stack(
        [(gradient.double().T @ inputs.double()).flatten() for gradient in outputs]
    )
    gramian = LinearFactors(inputs, outputs, torch.Size((1500, 30))).gramian()
    torch.testing.assert_close(gramian, formed @ formed.T)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_gramian_is_formed_in_float64(scale: float) -> None:
    factors, formed = linear(3, 6, 0)
    scaled = LinearFactors(factors.inputs, [d * scale for d in factors.outputs], factors.shape)
    flat = formed.flatten(1) * scale
    torch.testing.assert_close(scaled.gramian(), flat @ flat.T, rtol=1e-5, atol=0)


def test_a_gradient_that_cancels_has_no_negative_square() -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randn(1, 30, generator=generator, dtype=torch.float64)
        inputs = torch.cat([row, 3 * row, 7 * row])
        output = torch.randn(1, 20, generator=generator, dtype=torch.float64)
        cancelling = torch.cat([output, 2 * output, -output])
        factors = LinearFactors(inputs, [cancelling, cancelling * 2], torch.Size((20, 30)))
        assert (factors.gramian().diagonal() >= 0).all()
