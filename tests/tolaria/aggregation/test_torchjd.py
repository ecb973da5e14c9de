import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchjd.aggregation as torchjd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.tolaria.aggregation import Mode, PCGrad, Refreshed, TorchJDWeighting, backward
from tolaria.aggregation.models import make

# Every weighting of a Gramian, with the aggregator of whole Jacobians that it belongs to.
GRAMIAN: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "AlignedMTL": (torchjd.AlignedMTLWeighting, torchjd.AlignedMTL),
    "CAGrad": (lambda: torchjd.CAGradWeighting(0.5), lambda: torchjd.CAGrad(0.5)),
    "DualProj": (torchjd.DualProjWeighting, torchjd.DualProj),
    "FairGrad": (lambda: torchjd.FairGradWeighting(1.0), lambda: torchjd.FairGrad(1.0)),
    "GradVac": (torchjd.GradVacWeighting, torchjd.GradVac),
    "IMTLG": (torchjd.IMTLGWeighting, torchjd.IMTLG),
    "Krum": (lambda: torchjd.KrumWeighting(1), lambda: torchjd.Krum(1)),
    "MGDA": (torchjd.MGDAWeighting, torchjd.MGDA),
    "PCD": (torchjd.PCDWeighting, torchjd.PCD),
    "PCGrad": (torchjd.PCGradWeighting, torchjd.PCGrad),
    "UPGrad": (torchjd.UPGradWeighting, torchjd.UPGrad),
}
# They look at the number of tasks alone, so that a Gramian serves them as well as a Jacobian.
ANY: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Constant": (
        lambda: torchjd.ConstantWeighting(torch.tensor([0.1, 0.2, 0.3, 0.4]).double()),
        lambda: torchjd.Constant(torch.tensor([0.1, 0.2, 0.3, 0.4]).double()),
    ),
    "Mean": (torchjd.MeanWeighting, torchjd.Mean),
    "Random": (torchjd.RandomWeighting, torchjd.Random),
    "Sum": (torchjd.SumWeighting, torchjd.Sum),
}
every_weighting = pytest.mark.parametrize(
    ("weighting", "aggregator"), [*GRAMIAN.values(), *ANY.values()], ids=[*GRAMIAN, *ANY]
)


def jacobian(seed: int, tasks: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, 9, generator=generator, dtype=torch.float64)


def test_no_gramian_weighting_of_the_package_is_missing_here() -> None:
    found = {
        name.removesuffix("Weighting")
        for name, value in vars(torchjd).items()
        if inspect.isclass(value)
        and issubclass(value, torchjd.Weighting)
        and any("PSDMatrix" in str(base) for base in getattr(value, "__orig_bases__", ()))
    }
    assert found == set(GRAMIAN)


@every_weighting
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_it_gives_what_torchjd_gives_for_the_same_matrix(
    weighting: Callable[[], Any], aggregator: Callable[[], Any], seed: int
) -> None:
    rows = jacobian(seed)
    torch.manual_seed(seed)
    expected = aggregator()(rows)
    torch.manual_seed(seed)
    weights = TorchJDWeighting(weighting()).weights(rows @ rows.T)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights @ rows, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "CAGrad", "AlignedMTL", "DualProj", "IMTLG"])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_normalised_weights_do_not_depend_on_the_scale(name: str, scale: float) -> None:
    rows = jacobian(3)
    weighting = TorchJDWeighting(GRAMIAN[name][0](), normalise=True)
    weights = weighting.weights(rows @ rows.T)
    scaled = weighting.weights(scale * rows @ rows.T * scale)
    torch.testing.assert_close(scaled, weights, rtol=1e-4, atol=1e-6)


def test_two_tasks_under_upgrad_are_pcgrad() -> None:
    rows = torch.tensor([[1.0, 0.3, 0.0], [-1.0, 0.4, 0.2]]).double()
    weighting = torchjd.UPGradWeighting(torch.ones(2, dtype=torch.float64))
    weights = TorchJDWeighting(weighting).weights(rows @ rows.T)
    torch.testing.assert_close(weights, PCGrad().weights(rows @ rows.T), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["sequential", "factored", "features"])
def test_it_trains_a_model_as_any_aggregator_does(mode: Mode) -> None:
    case = make("mlp")
    report = backward(
        case.losses(),
        case.parameters,
        TorchJDWeighting(torchjd.UPGradWeighting()),
        mode=mode,
    )
    weights = torchjd.UPGradWeighting()(report.gramian)
    torch.testing.assert_close(report.weights, weights)
    assert all(parameter.grad is not None for parameter in case.parameters)


@pytest.mark.parametrize("name", ["GradVac", "PCD"])
def test_the_state_of_a_weighting_is_saved_and_restored(name: str) -> None:
    made = TorchJDWeighting(GRAMIAN[name][0]())
    for seed in range(3):
        made.weights(jacobian(seed) @ jacobian(seed).T)
    saved = made.state_dict()
    torch.manual_seed(0)
    expected = made.weights(jacobian(7) @ jacobian(7).T)
    restored = TorchJDWeighting(GRAMIAN[name][0]())
    before = torch.get_rng_state()
    restored.load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    found = restored.weights(jacobian(7) @ jacobian(7).T)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    fresh = TorchJDWeighting(GRAMIAN[name][0]())
    torch.manual_seed(0)
    assert not torch.equal(fresh.weights(jacobian(7) @ jacobian(7).T), expected)


def test_it_may_be_refreshed_now_and_then() -> None:
    case = make("mlp")
    aggregator = Refreshed(TorchJDWeighting(torchjd.MGDAWeighting()), every=3)
    ages = [backward(case.losses(), case.parameters, aggregator).age for _ in range(4)]
    assert ages == [0, 1, 2, 0]


def test_a_plain_function_serves_too() -> None:
    weighting = TorchJDWeighting(lambda gramian: gramian.diagonal() * 2)
    assert weighting.weights(torch.eye(3).double()).tolist() == [2, 2, 2]
    assert weighting.state_dict() == {"tasks": 3, "weighting": {}}


@pytest.mark.parametrize(
    "weighting", [lambda gramian: gramian, lambda gramian: [1.0, 2.0], nn.Identity()]
)
def test_anything_but_weights_is_refused(weighting: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match="give a Gramian weighting"):
        TorchJDWeighting(weighting).weights(torch.eye(2).double())


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weighting is a int"):
        TorchJDWeighting(3)  # type: ignore[arg-type]
