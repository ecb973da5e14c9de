"""Pairs of layers that grow within a model that trains."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.core.config import GrowthConfig
from esper.kasmina import Kasmina
from esper.kasmina.slot import slots_of
from esper.leyline import Planting, SeedCommand, SeedOperation, Stage
from support.growth import QUICK, batch


class Reader(nn.Module):
    """Two pairs that have no layer in common."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3 * 36, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        )

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


CONVOLUTIONS, PERCEPTRON = "net.0>net.3", "net.6>net.8"


class Growing:
    """A loop with a model of pairs."""

    def __init__(self, *slots: str, config: GrowthConfig = QUICK, frozen: str = "") -> None:
        torch.manual_seed(0)
        self.model = Reader()
        if frozen:
            self.model.get_submodule(frozen).requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=3e-3)
        self.kasmina = Kasmina(
            self.model, self.optimizer, slots=slots, sample=batch()[0], config=config
        )
        self.steps = 0

    def loss(self, content: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(self.model(content[0]), content[1])

    def step(self, count: int) -> None:
        for _ in range(count):
            content = batch(self.steps)
            self.optimizer.zero_grad()
            self.loss(content).backward()
            self.kasmina.train_seeds(lambda content=content: self.loss(content))
            self.optimizer.step()
            self.kasmina.settle()
            self.steps += 1

    def plant(self, slot: str, training: str = "insert") -> None:
        planting = Planting(training=training)
        command = SeedCommand(slot, SeedOperation.GERMINATE, "widen", planting)
        report = self.kasmina.apply(command)
        assert report.applied, report.detail

    def fossilise(self, slot: str) -> None:
        """Train until the seed is worth it, and fold it."""
        detail = ""
        for _ in range(40):
            self.step(10)
            self.kasmina.survey(self.loss, [batch(1000 + index, 128) for index in range(8)], None)
            report = self.kasmina.apply(SeedCommand(slot, SeedOperation.ADVANCE))
            detail = report.detail
            if report.after is Stage.FOSSILISED:
                return
        raise AssertionError(detail)

    def check(self) -> None:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        assert len(held) == len({id(p) for p in held})
        assert {id(p) for p in held} == {id(p) for p in trained}
        assert {id(p) for p in self.optimizer.state} <= {id(p) for p in held}

    def outputs(self) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(self.model).eval()(batch(77)[0])


def test_several_pairs_grow_at_a_time() -> None:
    growing = Growing(CONVOLUTIONS, PERCEPTRON)
    growing.plant(CONVOLUTIONS)
    growing.plant(PERCEPTRON)
    growing.step(10)
    before = growing.outputs()
    growing.kasmina.finish()
    torch.testing.assert_close(growing.outputs(), before)
    growing.check()
    net = growing.model.net
    assert not slots_of(growing.model)
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels) == (6, 6, 6)
    assert (net[6].out_features, net[8].in_features) == (8, 8)
    fresh = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert [type(module) for module in net[:7]] == fresh
    growing.step(3)


def test_the_same_pair_grows_twice() -> None:
    config = QUICK.model_copy(update={"growths_per_slot": 2})
    growing = Growing(PERCEPTRON, config=config)
    for width in (8, 16):
        growing.plant(PERCEPTRON)
        growing.fossilise(PERCEPTRON)
        growing.check()
        assert growing.model.net[6].out_features == width
        growing.step(2)
    assert growing.kasmina.stages == {PERCEPTRON: Stage.FOSSILISED}
    growing.kasmina.release()
    assert [type(m) for m in growing.model.net[6:]] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("frozen", ["net.6", "net.8"])
def test_a_frozen_layer_of_a_pair_stays_frozen_and_out_of_the_optimizer(frozen: str) -> None:
    growing = Growing(PERCEPTRON, frozen=frozen)
    growing.plant(PERCEPTRON)
    growing.step(10)
    before = growing.outputs()
    growing.kasmina.finish()
    torch.testing.assert_close(growing.outputs(), before)
    growing.check()
    assert not any(p.requires_grad for p in growing.model.get_submodule(frozen).parameters())


def test_a_pair_is_still_offered_while_another_seed_trains_behind_it() -> None:
    growing = Growing(CONVOLUTIONS, PERCEPTRON)
    growing.plant(PERCEPTRON, "shadow")
    growing.step(3)
    held_out = [batch(1000 + index) for index in range(2)]
    state = growing.kasmina.survey(growing.loss, held_out, None)
    assert state.seeds[CONVOLUTIONS].offers.keys() == {"widen"}
    growing.plant(CONVOLUTIONS, "shadow")
    growing.step(3)
    assert set(growing.kasmina.stages.values()) == {Stage.TRAINING}
