import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.blend import make_blend
from esper.kasmina.blueprints import Blueprint, Flow, Residual, Seed
from esper.kasmina.blueprints.base import Value
from esper.kasmina.blueprints.plain import AddBlend, Grown
from esper.leyline import GrowthError
from kasmina.blueprints.builders import CASES, built, flow, flowing, pair_of, stir


class Scaled(Blueprint):
    """A seed of a package's own, with arguments of every kind."""

    name = "scaled"
    defaults: ClassVar[Mapping[str, Value]] = {"factor": 1.0, "kind": "plain", "width": 0}

    def fits(self, flow: Flow) -> str:
        return ""

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        if arguments["kind"] == "broken":
            raise ZeroDivisionError("of the package's own making")
        return Scale(flow.channels, arguments["factor"])


class Scale(nn.Module):
    def __init__(self, features: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.last = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(x)) * self.factor


def test_a_whole_number_is_taken_for_a_fraction() -> None:
    seed = Scaled().build(flow("features"), factor=2)
    assert seed.factor == 2.0
    assert type(seed.factor) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_fractions_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(GrowthError, match=f"'factor' of blueprint 'scaled' is {value}; give 0 or"):
        Scaled().build(flow("features"), factor=value)


def test_what_a_package_raises_is_told_as_a_refusal() -> None:
    with pytest.raises(GrowthError, match=r"'scaled' cannot build a seed .*ZeroDivisionError: of"):
        Scaled().build(flow("features"), kind="broken")


def test_a_blueprint_that_widens_nothing_says_so() -> None:
    pair = pair_of(nn.Linear(2, 3), nn.Linear(3, 2), source=(4, 2))
    with pytest.raises(GrowthError, match="'scaled' does not widen layers"):
        Scaled().fold_pair(pair, nn.Identity(), 1.0)


def test_a_share_is_only_multiplied_in_where_the_output_is_linear_in_the_last_layer() -> None:
    x, host = flowing("features"), nn.Linear(12, 12)
    seed = Scaled().build(flow("features"))
    folded = Scaled().fold(host, seed, AddBlend(), 0.5)
    assert type(folded.grown) is Grown
    torch.testing.assert_close(folded(x), host(x) + 0.5 * seed(host(x)))

    class Squared(Seed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    own = Squared(nn.Identity(), nn.Linear(12, 12))
    folded = Scaled().fold(host, own, AddBlend(), 0.5)
    torch.testing.assert_close(folded(x), host(x) + 0.5 * own(host(x)))
    assert type(Scaled().fold(host, built("mlp", "features"), AddBlend(), 0.5).grown) is Residual


def test_a_share_is_folded_as_precisely_as_it_was_blended() -> None:
    seed, host = built("squeeze_excite", "features", torch.bfloat16), nn.Identity()
    stir(seed)
    x = flowing("features", torch.bfloat16)
    folded = Scaled().fold(host, seed, AddBlend(), 0.3)
    assert torch.equal(folded(x), AddBlend()(x, seed(x), torch.tensor(0.3)))


@pytest.mark.parametrize("blending", ["add", "multiply", "gate", "channel"])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_is_folded_can_be_pickled(name: str, layout: str, blending: str) -> None:
    seed, blend = built(name, layout), make_blend(blending, flow(layout))
    for part in (seed, blend):
        stir(part)
    folded = Scaled().fold(nn.Identity(), seed, blend, 0.5).eval()
    x = flowing(layout)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))
