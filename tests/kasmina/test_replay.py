"""Leaving out what a shadow pass has in common with the host's pass changes no gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import Kasmina
from esper.kasmina.replay import Memo
from esper.kasmina.slot import slots_of
from esper.leyline import SeedCommand, SeedOperation
from support.growth import QUICK


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).tanh())


class InPlaceModule(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.other = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.other(self.second(self.relu(self.first(x))))
        return self.head(self.third(hidden).tanh())


class InPlaceFunction(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 1.0
        return self.head(self.third(self.second(hidden)).tanh())


class Skip(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.head((self.third(self.second(hidden).relu()) + hidden).tanh())


class Preprocesses(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2.0)


class Branches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        left = self.first(x).relu()
        return (
            self.head(self.third(self.second(left) * left).tanh()) + self.first(x).sum(1)[:, None]
        )


MODELS = [Plain, InPlaceModule, InPlaceFunction, Skip, Preprocesses, Branches]


def gradients(kind: Callable[[], Plain], *, replay: bool, passes: int = 1) -> list[Tensor]:
    """Return the seed's gradients."""
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kasmina = Kasmina(model, optimizer, slots=["third"], sample=torch.randn(4, 6), config=QUICK)
    assert kasmina.apply(SeedCommand("third", SeedOperation.GERMINATE, "mlp")).applied
    kasmina.settle()
    slot = slots_of(model)["third"]
    with torch.no_grad():
        for weight in slot.own_parameters():
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    if not replay:
        kasmina._shadow.replay.stop()
    content = torch.randn(16, 6)
    for _ in range(passes):
        model(content).square().mean().backward()
    kasmina.train_seeds(lambda: model(content).square().mean())
    assert all(parameter.requires_grad for parameter in model.parameters())
    return [weight.grad.clone() for weight in slot.own_parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_to_the_bit(kind: Callable[[], Plain]) -> None:
    fast = gradients(kind, replay=True)
    slow = gradients(kind, replay=False)
    assert any(bool(gradient.abs().sum() > 0) for gradient in slow)
    assert all(map(torch.equal, fast, slow))


def test_a_model_that_ran_twice_is_computed_anew() -> None:
    fast = gradients(Plain, replay=True, passes=2)
    slow = gradients(Plain, replay=False, passes=2)
    assert all(map(torch.equal, fast, slow))


def test_another_batch_is_computed_anew() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kasmina = Kasmina(model, optimizer, slots=["third"], sample=torch.randn(4, 6), config=QUICK)
    kasmina.apply(SeedCommand("third", SeedOperation.GERMINATE, "mlp"))
    kasmina.settle()
    slot = slots_of(model)["third"]
    with torch.no_grad():
        slot.seed.last.weight.fill_(0.1)
    one, other = torch.randn(16, 6), torch.randn(16, 6)
    found = []
    for seen in (one, other):
        model(seen).square().mean().backward()
        kasmina.train_seeds(lambda: model(other).square().mean())
        found.append([weight.grad.clone() for weight in slot.own_parameters()])  # type: ignore[union-attr]
        kasmina.settle()
    assert all(map(torch.equal, *found))


def test_what_was_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    run = Memo.run

    def watched(
        self: Memo, forward: Callable[..., Tensor], inputs: object, named: object
    ) -> Tensor:
        calls.append(self.mode)
        return run(self, forward, inputs, named)

    monkeypatch.setattr(Memo, "run", watched)
    gradients(Plain, replay=True)
    assert calls == ["record"] * 3 + ["replay"] * 3
