import pytest
import torch
from torch import nn

from esper.tolaria.aggregation import Mean, Mode, PCGrad, backward, by_layer, by_name
from tolaria.aggregation.models import TwoHeads, gradients_of, make


def test_named_heads_get_the_plain_sum() -> None:
    model, plain = TwoHeads(), TwoHeads()
    heads = list(model.trunk[2].parameters())
    report = backward(model.losses(), list(model.parameters()), Mean(), heads=heads)
    torch.stack(list(plain.losses().values())).sum().backward()
    torch.testing.assert_close(model.trunk[2].weight.grad, plain.trunk[2].weight.grad)
    # All others are projected, also those that one task alone reaches.
    torch.testing.assert_close(model.first.weight.grad * 2, plain.first.weight.grad)
    rows = [
        torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True, allow_unused=True)
        for loss in plain.losses().values()
    ]
    squares = [
        sum(
            gradient.double().square().sum()
            for parameter, gradient in zip(plain.parameters(), row, strict=True)
            if gradient is not None and all(parameter is not p for p in plain.trunk[2].parameters())
        )
        for row in rows
    ]
    torch.testing.assert_close(report.gramian.diagonal(), torch.stack(squares))  # type: ignore[arg-type]


def test_with_no_heads_everything_is_projected() -> None:
    model, plain = TwoHeads(), TwoHeads()
    backward(model.losses(), list(model.parameters()), Mean(), heads=())
    torch.stack(list(plain.losses().values())).mean().backward()
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_each_layer_has_weights_and_a_report_of_its_own() -> None:
    case = make("mlp", dtype=torch.float64)
    rows = [
        torch.autograd.grad(loss, list(case.trunk.parameters()), retain_graph=True)
        for loss in case.losses().values()
    ]
    groups = {name: members for name, members in by_layer(case.trunk).items() if members}
    groups["heads"] = list(case.heads.parameters())
    report = backward(case.losses(), case.parameters, PCGrad(), groups=groups)
    assert list(report.groups) == ["0", "2.inner", "4"]
    assert report.weights.shape == (3, 3)
    torch.testing.assert_close(
        report.gramian, torch.stack([part.gramian for part in report.groups.values()]).sum(0)
    )
    generator = PCGrad()
    for place, (name, part) in enumerate(report.groups.items()):
        matrix = torch.stack(
            [torch.cat([row[2 * place].flatten(), row[2 * place + 1]]) for row in rows]
        )
        torch.testing.assert_close(part.gramian, matrix @ matrix.T)
        weights = generator.weights(matrix @ matrix.T)
        torch.testing.assert_close(part.weights, weights)
        weight = groups[name][0]
        torch.testing.assert_close(
            weight.grad.flatten(),
            (weights @ matrix)[: weight.numel()],  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("mode", ["sequential", "batched", "factored"])
def test_one_group_of_everything_is_no_group(mode: Mode) -> None:
    case = make("words", dtype=torch.float64)
    torch.manual_seed(4)
    backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    expected = case.gradients()
    case.clear()
    groups = {"all": case.parameters}
    torch.manual_seed(4)
    report = backward(case.losses(), case.parameters, PCGrad(), mode=mode, groups=groups)
    assert list(report.groups) == ["all"]
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_groups_by_name_take_what_lies_under_them() -> None:
    model = TwoHeads()
    groups = by_name(model, ["trunk.0", ""])
    report = backward(model.losses(), list(model.parameters()), PCGrad(), groups=groups)
    assert list(report.groups) == ["trunk.0", ""]


def test_frozen_parameters_may_stand_in_groups() -> None:
    model = TwoHeads()
    model.trunk[0].weight.requires_grad_(requires_grad=False)
    groups = {"first": [model.trunk[0].weight], "rest": list(model.trunk.parameters())[1:]}
    report = backward(model.losses(), list(model.parameters()), PCGrad(), groups=groups)
    assert list(report.groups) == ["rest"]


def test_a_shared_parameter_outside_every_group_is_refused() -> None:
    model = TwoHeads()
    groups = {"some": list(model.trunk[0].parameters())}
    with pytest.raises(RuntimeError, match=r"shape \(8, 8\) is in no group"):
        backward(model.losses(), list(model.parameters()), PCGrad(), groups=groups)


@pytest.mark.parametrize("mode", ["sequential", "factored", "batched"])
def test_groups_of_tasks_that_share_nothing_are_empty(mode: Mode) -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = {"a": first.sum(), "b": second.sum() * 2}
    report = backward(losses, [first, second], PCGrad(), groups={"all": [first, second]}, mode=mode)
    assert report.groups == {}
    assert report.gramian.tolist() == [[0, 0], [0, 0]]
    assert report.weights.shape == (0, 2)
    assert second.grad is not None
    assert second.grad.tolist() == [2, 2]


class Returning:
    """An aggregator of the user's."""

    def __init__(self, weights: object) -> None:
        self._weights = weights

    def weights(self, gramian: torch.Tensor) -> torch.Tensor:
        return self._weights  # type: ignore[return-value]


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor(0.5).expand(2),
        torch.diagonal(torch.tensor([[0.5, 9.0], [9.0, 0.5]])),
        torch.tensor([0.5, 0.5], requires_grad=True),
        torch.tensor([0.5, 0.5], dtype=torch.float32),
    ],
    ids=["expanded", "strided", "with a graph", "float32"],
)
def test_weights_of_any_layout_are_taken(weights: torch.Tensor, kernels_in_use: str) -> None:
    model, plain = TwoHeads(), TwoHeads()
    report = backward(model.losses(), list(model.parameters()), Returning(weights))
    backward(plain.losses(), list(plain.parameters()), Mean())
    assert report.weights.tolist() == [0.5, 0.5]
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("weights", [torch.ones(1), torch.ones(20), torch.ones(2, 2), [1.0, 1.0]])
def test_anything_but_a_weight_for_each_task_is_refused(weights: object) -> None:
    model = TwoHeads()
    with pytest.raises(RuntimeError, match=r"Returning returned weights .* for 2 tasks"):
        backward(model.losses(), list(model.parameters()), Returning(weights))
    assert gradients_of(model) == {}


def test_an_aggregator_that_fails_for_one_group_leaves_all_gradients_alone() -> None:
    class Second:
        calls = 0

        def weights(self, gramian: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("no weights for this part")
            return torch.ones(len(gramian), dtype=torch.float64)

    model = TwoHeads()
    with pytest.raises(ValueError, match="no weights"):
        backward(model.losses(), list(model.parameters()), Second(), groups=by_layer(model))
    assert gradients_of(model) == {}


def test_a_head_that_cannot_be_combined_leaves_the_trunk_alone() -> None:
    weight, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    losses = {"a": weight.sum() + head.abs().sum(), "b": weight.square().sum()}
    with pytest.raises(RuntimeError, match="give real gradients"):
        backward(losses, [weight, head], PCGrad())
    assert weight.grad is None


def test_a_head_outside_the_parameters_is_refused() -> None:
    model = TwoHeads()
    for heads in ([torch.ones(1, requires_grad=True)], ["first.weight"]):
        with pytest.raises(RuntimeError, match="head 0 is not among the parameters"):
            backward(model.losses(), list(model.parameters()), PCGrad(), heads=heads)  # type: ignore[arg-type]


def test_groups_may_be_given_as_iterators() -> None:
    model = TwoHeads()
    groups = {"trunk": model.trunk.parameters()}
    report = backward(model.losses(), model.parameters(), PCGrad(), groups=groups)
    assert list(report.groups) == ["trunk"]


def test_without_a_head_a_scaler_finds_its_way() -> None:
    weight = nn.Parameter(torch.ones(5, device="meta"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = {"a": weight.sum(), "b": weight.square().sum()}
    report = backward(losses, [weight], Mean(), scaler=scaler)
    assert report.gramian.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_without_a_head_a_scaler_finds_its_way_on_cuda() -> None:
    weight = nn.Parameter(torch.ones(5, device="cuda"))
    scaler = torch.amp.GradScaler("cuda")
    losses = {"a": weight.sum(), "b": weight.square().sum()}
    assert backward(losses, [weight], PCGrad(), scaler=scaler).nonfinite == ()
