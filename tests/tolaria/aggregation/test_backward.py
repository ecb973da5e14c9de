import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import Mean, PCGrad, Sum, backward


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.first = nn.Linear(8, 3)
        self.second = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def losses(self) -> dict[str, Tensor]:
        hidden = self.trunk(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
        return {
            "first": self.first(hidden).square().mean(),
            "second": -self.second(hidden).tanh().mean(),
        }


def gradients_of(model: TwoHeads) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
