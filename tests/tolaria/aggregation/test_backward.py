from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import (
    MODES,
    Mean,
    Mode,
    PCGrad,
    Refreshed,
    Sum,
    Weighted,
    backward,
)
from tolaria.aggregation.models import TwoHeads, gradients_of, make


def test_sum_equals_one_backward_pass_of_the_summed_loss() -> None:
    model, plain = TwoHeads(), TwoHeads()
    backward(model.losses(), list(model.parameters()), Sum())
    torch.stack(list(plain.losses().values())).sum().backward()
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_heads_keep_their_own_gradient_and_unused_parameters_have_none() -> None:
    model, plain = TwoHeads(), TwoHeads()
    backward(model.losses(), list(model.parameters()), Mean())
    torch.stack(list(plain.losses().values())).sum().backward()
    torch.testing.assert_close(model.first.weight.grad, plain.first.weight.grad)
    assert model.trunk[0].weight.grad is not None
    torch.testing.assert_close(model.trunk[0].weight.grad * 2, plain.trunk[0].weight.grad)
    assert model.unused.weight.grad is None


def test_gradients_accumulate() -> None:
    model = TwoHeads()
    backward(model.losses(), list(model.parameters()), Sum())
    once = gradients_of(model)
    backward(model.losses(), list(model.parameters()), Sum())
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, once[name] * 2)


def test_the_report_describes_the_shared_gradients() -> None:
    model = TwoHeads()
    rows = []
    for task in ("first", "second"):
        model.zero_grad()
        model.losses()[task].backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).double())
    model.zero_grad()
    report = backward(model.losses(), list(model.parameters()), PCGrad())
    expected = rows[0] @ rows[1] / (rows[0].norm() * rows[1].norm())
    assert report.tasks == ("first", "second")
    assert report.cosines() == {"first|second": pytest.approx(float(expected), abs=1e-6)}
    assert report.conflicts == int(expected < 0)
    torch.testing.assert_close(report.norms, torch.stack([row.norm() for row in rows]))


def test_conflict_rate_and_share() -> None:
    direction = nn.Parameter(torch.zeros(3))
    targets = torch.eye(3) * 2 - 0.9
    losses = {str(i): -(direction * targets[i]).sum() for i in range(3)}
    report = backward(losses, [direction], PCGrad())
    assert report.conflicts == 3
    assert report.conflict_rate == 1.5
    assert report.conflict_share == 1.0


def test_two_parameters_with_one_gradient_tensor_stay_apart() -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    shared = nn.Parameter(torch.ones(4))
    losses = {"a": ((first + second) * 3).sum() + shared.sum(), "b": shared.sum()}
    backward(losses, [first, second, shared], Sum())
    assert first.grad is not None
    assert second.grad is not None
    first.grad.mul_(2)
    assert second.grad.tolist() == [3.0] * 4


def test_half_precision_gradients_are_combined_in_float32() -> None:
    weight = nn.Parameter(torch.randn(64, dtype=torch.bfloat16))
    scales = [0.3337, 1.7771, 2.3331]
    losses = {str(i): (weight * scale).sum() for i, scale in enumerate(scales)}
    backward(losses, [weight], Mean())
    rounded = torch.tensor(scales).bfloat16().float()
    assert weight.grad is not None
    assert torch.equal(weight.grad, rounded.mean().bfloat16().expand(64))


def test_a_scaler_scales_every_loss() -> None:
    model, plain = TwoHeads(), TwoHeads()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward(model.losses(), list(model.parameters()), PCGrad(), scaler=scaler)
    backward(plain.losses(), list(plain.parameters()), PCGrad())
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name] * 8)


def test_no_loss_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no gradients available for aggregation"):
        backward({}, [nn.Parameter(torch.ones(1))], Sum())


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    loss = table(torch.tensor([1])).sum()
    with pytest.raises(RuntimeError, match="sparse=False"):
        backward({"a": loss, "b": loss * 2}, [table.weight], Sum())


def test_one_task_alone_is_projected_against_nothing() -> None:
    model, plain = TwoHeads(), TwoHeads()
    report = backward({"first": model.losses()["first"]}, list(model.parameters()), PCGrad())
    plain.losses()["first"].backward()
    expected = gradients_of(plain)
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert (report.conflicts, report.conflict_rate, report.conflict_share) == (0, 0.0, 0.0)


def test_an_absent_task_is_a_dropped_row() -> None:
    model, plain = TwoHeads(), TwoHeads()
    losses = model.losses()
    report = backward(
        {"none": None, "first": losses["first"], "second": losses["second"]},
        list(model.parameters()),
        Weighted({"none": 5, "first": 1, "second": 3}),
    )
    assert report.tasks == ("first", "second")
    assert report.absent == ("none",)
    assert report.weights.tolist() == [0.25, 0.75]
    losses = plain.losses()
    (0.25 * losses["first"] + 0.75 * losses["second"]).backward()
    torch.testing.assert_close(model.trunk[0].weight.grad, plain.trunk[0].weight.grad)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_are_left_alone(mode: Mode) -> None:
    model, plain = TwoHeads(), TwoHeads()
    for frozen in (model, plain):
        frozen.trunk[0].requires_grad_(requires_grad=False)
    backward(model.losses(), list(model.parameters()), Sum(), mode=mode)
    torch.stack(list(plain.losses().values())).sum().backward()
    expected = gradients_of(plain)
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_asked_for_gets_no_gradient(mode: Mode) -> None:
    case = make("mlp")
    asked = list(case.trunk[2].parameters())  # type: ignore[index]
    backward(case.losses(), asked, PCGrad(), mode=mode)
    assert [p.grad is not None for p in case.parameters] == [
        any(p is a for a in asked) for p in case.parameters
    ]


def test_one_forward_pass_serves_all_tasks() -> None:
    case = make("convolutions")
    norm = case.trunk[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    before = int(norm.num_batches_tracked or 0)
    backward(case.losses(), case.parameters, PCGrad())
    assert norm.num_batches_tracked == before + 1


@pytest.mark.parametrize("mode", MODES)
def test_the_global_generators_are_not_drawn_from(mode: Mode) -> None:
    case = make("mlp")
    losses = case.losses()
    before = torch.get_rng_state()
    backward(losses, case.parameters, PCGrad(), mode=mode)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate_in_every_mode(mode: Mode) -> None:
    case = make("convolutions")
    backward(case.losses(), case.parameters, Mean(), mode=mode)
    once = [gradient * 2 for gradient in case.gradients() if gradient is not None]
    before = [parameter.grad for parameter in case.parameters]
    backward(case.losses(), case.parameters, Mean(), mode=mode)
    assert all(p.grad is g for p, g in zip(case.parameters, before, strict=True)), "not in place"
    for found, wanted in zip(case.gradients(), once, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_under_conflict_the_update_is_not_the_sum() -> None:
    weight = nn.Parameter(torch.zeros(2))
    losses = {"a": weight @ torch.tensor([1.0, 0.2]), "b": weight @ torch.tensor([-1.0, 0.2])}
    report = backward(losses, [weight], PCGrad())
    assert report.conflicts == 1
    assert weight.grad is not None
    assert weight.grad[1] > 0.7, "the plain sum is 0.4"


def test_losses_with_one_element_count_as_scalars() -> None:
    weight = nn.Parameter(torch.ones(3))
    backward({"a": weight[:1] * 2, "b": (weight * 3).sum().view(1, 1)}, [weight], Sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [5, 3, 3]


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ({"a": torch.ones(2, requires_grad=True)}, {}, r"'a' has shape \(2,\)"),
        ({"a": torch.ones(())}, {}, "'a' carries no gradient"),
        ({"a": None}, {}, "no gradients available for aggregation"),
        ({"a": torch.ones((), requires_grad=True)}, {"mode": "fast"}, "mode is 'fast'; give one"),
        (
            {"a": torch.ones((), requires_grad=True)},
            {"mode": "features", "heads": ()},
            "leave out groups and heads",
        ),
        (
            {"a": torch.ones((), requires_grad=True)},
            {"aggregator": Refreshed(Sum(), every=2), "groups": {}},
            "leave out groups and heads",
        ),
    ],
)
def test_bad_input_is_refused(
    losses: dict[str, Tensor | None], options: dict[str, Any], message: str
) -> None:
    aggregator = options.pop("aggregator", Sum())
    with pytest.raises(RuntimeError, match=message):
        backward(losses, [nn.Parameter(torch.ones(1))], aggregator, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["sequential", "factored", "features"])
def test_nothing_waits_for_the_device(mode: Mode) -> None:
    case = make("mlp").to("cuda")
    backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.conflict_share <= 1


@pytest.mark.parametrize("mode", MODES)
def test_one_task_has_the_same_weight_in_every_mode(mode: Mode) -> None:
    model, plain = TwoHeads(), TwoHeads()
    loss = {"first": model.losses()["first"]}
    report = backward(loss, list(model.parameters()), PCGrad(preferences=[3.0]), mode=mode)
    assert report.weights.tolist() == [3]
    (3 * plain.losses()["first"]).backward()
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_parameter_that_is_given_twice_counts_once() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    backward({"a": weight.sum() * 5}, [weight, weight], Sum())
    assert weight.grad.tolist() == [6]


def test_a_write_to_grad_is_noticed_by_whoever_saved_it() -> None:
    weight, factor = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    later = (factor * weight.grad).sum()
    backward({"a": weight.sum(), "b": weight.square().sum()}, [weight], Sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize(
    ("losses", "parameters", "message"),
    [
        ([torch.ones((), requires_grad=True)], [], "losses are a list"),
        ({"a": 1.0}, [], "'a' is a float"),
        (None, [("weight", nn.Parameter(torch.ones(1)))], "parameter 0 is a tuple and no leaf"),
        (None, [torch.ones(1, requires_grad=True) * 2], "parameter 0 is a Tensor and no leaf"),
    ],
)
def test_what_is_no_loss_or_parameter_is_refused(
    losses: Any, parameters: Any, message: str
) -> None:
    given = {"a": torch.ones((), requires_grad=True)} if losses is None else losses
    with pytest.raises(RuntimeError, match=message):
        backward(given, parameters, Sum())


def test_wrapped_tensors_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    weight = nn.Parameter(TwoTensor(torch.randn(4), torch.randn(4)))
    with pytest.raises(RuntimeError, match="parameter 0 is a TwoTensor; only plain"):
        backward({"a": (weight * 2).sum(), "b": weight.square().sum()}, [weight], Sum())
