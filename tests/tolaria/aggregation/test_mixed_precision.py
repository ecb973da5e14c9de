import math

import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import MODES, MicroBatches, Mode, PCGrad, backward
from tolaria.aggregation.models import Case, make

EXACT_MODES = ("sequential", "factored", "batched")


def reference(case: Case) -> tuple[Tensor, list[Tensor | None]]:
    report = backward(case.losses(), case.parameters, PCGrad())
    result = case.gradients()
    case.clear()
    return report.gramian, result


@pytest.mark.parametrize("mode", MODES)
def test_a_scaler_scales_gradients_and_not_the_report(mode: Mode) -> None:
    case = make("mlp")
    plain = backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    expected = case.gradients()
    case.clear()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    report = backward(case.losses(), case.parameters, PCGrad(), mode=mode, scaler=scaler)
    torch.testing.assert_close(report.gramian, plain.gramian)
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, None if wanted is None else wanted * 2**16)


def test_the_scaler_unscales_once_and_steps_as_without_it() -> None:
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        case = make("mlp")
        optimizer = torch.optim.SGD(case.parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(case.losses(), case.parameters, PCGrad(), scaler=scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        weights.append([parameter.detach().clone() for parameter in case.parameters])
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["trunk", "head"])
def test_an_infinity_in_one_task_is_reported_and_skips_the_step(mode: Mode, place: str) -> None:
    case = make("mlp")
    optimizer = torch.optim.SGD(case.parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [parameter.detach().clone() for parameter in case.parameters]
    losses = case.losses()
    # An overflow that reaches the trunk, or only the head's last bias.
    bias = case.heads["second"][2].bias
    other = (
        losses["second"] * math.inf
        if place == "trunk"
        else losses["second"] + bias.sum() * math.inf
    )
    losses["second"] = other
    report = backward(losses, case.parameters, PCGrad(), mode=mode, scaler=scaler)
    assert report.nonfinite == ("second",)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15, "the scaler did not see the infinity"
    for parameter, kept in zip(case.parameters, before, strict=True):
        assert torch.equal(parameter, kept)


def test_a_gradient_that_is_not_finite_is_not_hidden_by_the_projection() -> None:
    weight = nn.Parameter(torch.ones(3))
    bad = torch.tensor([1.0, math.nan, 1.0])
    report = backward({"good": weight.sum(), "bad": (weight * bad).sum()}, [weight], PCGrad())
    assert report.nonfinite == ("bad",)
    assert weight.grad is not None
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_gradients_of_bfloat16(mode: Mode, device: str) -> None:
    case = make("mlp").to(device)
    gramian, expected = reference(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = case.losses()
    report = backward(losses, case.parameters, PCGrad(), mode=mode)
    if mode != "features":
        torch.testing.assert_close(report.gramian, gramian, rtol=0.1, atol=1e-4)
    for found, wanted in zip(case.gradients(), expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 0.2 * wanted.norm() + 1e-3


@pytest.mark.parametrize("kind", ["convolutions", "words"])
@pytest.mark.parametrize("mode", ["sequential", "factored"])
def test_autocast_with_normalisation_layers(kind: str, mode: Mode, device: str) -> None:
    case = make(kind).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = case.losses()
    report = backward(losses, case.parameters, PCGrad(), mode=mode)
    assert report.nonfinite == ()
    assert all(parameter.grad is not None for parameter in case.parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_float16_on_cuda_with_a_scaler(mode: Mode) -> None:
    case = make("mlp").to("cuda")
    optimizer = torch.optim.SGD(case.parameters, lr=0.01)
    scaler = torch.amp.GradScaler("cuda")
    first = last = None
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            losses = case.losses()
        backward(losses, case.parameters, PCGrad(), mode=mode, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        last = float(sum(loss.item() for loss in losses.values()))
        first = last if first is None else first
    assert first is not None
    assert last is not None
    assert last < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_models_of_another_dtype(dtype: torch.dtype, mode: Mode) -> None:
    case = make("mlp", dtype=dtype)
    report = backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    assert report.gramian.dtype == torch.float64
    assert all(p.grad is not None and p.grad.dtype == dtype for p in case.parameters)


def test_micro_batches_take_a_scaler_that_changes_between_updates() -> None:
    case = make("mlp")
    expected_gramian, expected = reference(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    micro = MicroBatches(case.parameters, PCGrad(), scaler=scaler)
    micro.add(case.losses())
    report = micro.finish()
    torch.testing.assert_close(report.gramian, expected_gramian)
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, None if wanted is None else wanted * 64)
