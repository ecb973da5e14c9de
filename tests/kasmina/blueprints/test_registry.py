import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.kasmina import attach
from esper.kasmina.blueprints import Flow, get, names, offers, register, registry
from esper.kasmina.blueprints.dense import Mlp
from esper.leyline import GrowthError
from kasmina.blueprints.builders import (
    CASES,
    CPU,
    FITTING,
    SHAPES,
    built,
    flow,
    pair_flow,
    pair_of,
    unchanged_stream,
)

PACKAGE = """
from esper.kasmina.blueprints import Blueprint, Seed
from torch import nn

class Third(Blueprint):
    name = "third"
    defaults = {}

    def fits(self, flow):
        return ""

    def make(self, flow, arguments):
        return Seed(nn.Identity(), nn.Linear(flow.channels, flow.channels))

class Misshapen(Third):
    name = "misshapen"

    def make(self, flow, arguments):
        return Seed(nn.Identity(), nn.Linear(flow.channels, 1))

class Raising(Third):
    name = "raising"

    def make(self, flow, arguments):
        return nn.Linear(flow.channels + 1, flow.channels)

class Doubting(Third):
    name = "doubting"

    def fits(self, flow):
        raise ZeroDivisionError("of the package's own making")

class Mlp(Third):
    name = "mlp"

instance = Third()
"""
POINTS = """
[esper.blueprints]
third = third_party:Third
misshapen = third_party:Misshapen
raising = third_party:Raising
misnamed = third_party:instance
absent = third_party:NoSuch
crashing = third_party_crashing:Anything
nothing = third_party:nn
doubting = third_party:Doubting
twice = third_party:Third
mlp = third_party:Mlp
"""
OTHER_POINTS = """
[esper.blueprints]
third = third_party:Third
twice = third_party:Misshapen
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package with good and bad entry points, as pip would."""
    (tmp_path / "third_party.py").write_text(PACKAGE)
    (tmp_path / "third_party_crashing.py").write_text("1 / 0")
    for name, points in (("third-party", POINTS), ("other-party", OTHER_POINTS)):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry._points.cache_clear()
    yield
    registry._points.cache_clear()
    for name in ("third_party", "third_party_crashing"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("installed")
def test_a_blueprint_of_an_installed_package_is_one_like_any_other() -> None:
    assert {"third", "crashing", "mlp"} <= set(names())
    seed = get("third").build(flow("features"))
    assert seed(torch.randn(2, 12)).shape == (2, 12)
    assert get("third") is get("third")
    assert offers(flow("features"))["third"].parameters == 12 * 13


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crashing", "'crashing' of third_party_crashing:Anything cannot be loaded: ZeroDivision"),
        ("absent", "'absent' of third_party:NoSuch cannot be loaded: AttributeError"),
        ("misnamed", "third_party:instance is no blueprint of the name 'misnamed'"),
        ("nothing", "third_party:nn is no blueprint of the name 'nothing'"),
        ("thurd", "no blueprint 'thurd'; did you mean 'third'"),
        ("twice", "'twice' is offered by third_party:Misshapen and third_party:Third; uninstall"),
    ],
)
def test_a_broken_package_is_told_by_name_and_offers_nothing(name: str, reason: str) -> None:
    with pytest.raises(GrowthError, match=reason):
        get(name)
    assert name not in offers(flow("features"))


@pytest.mark.usefixtures("installed")
def test_what_would_not_work_is_not_offered() -> None:
    found = offers(flow("features"))
    assert sorted(found) == sorted([*FITTING["features"], "third"])


@pytest.mark.usefixtures("installed")
def test_a_package_does_not_take_a_name_of_ours() -> None:
    assert type(get("mlp")) is Mlp


@pytest.mark.usefixtures("installed")
def test_a_package_that_fails_to_tell_whether_it_fits_is_refused_by_name() -> None:
    with pytest.raises(GrowthError, match=r"'doubting' cannot tell .*ZeroDivisionError: of the"):
        get("doubting").build(flow("features"))


def test_an_unknown_name_that_is_near_to_none_lists_all() -> None:
    with pytest.raises(GrowthError, match=re.escape(f"there are: {', '.join(names())}")):
        get("zzz")


def test_a_name_belongs_to_one_class() -> None:
    class Other(Mlp):
        """Another one of the same name."""

    register(Mlp())
    with pytest.raises(GrowthError, match="there is a blueprint 'mlp' already"):
        register(Other())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_an_offer_has_the_parameters_of_the_seed_that_is_built(name: str, layout: str) -> None:
    seed = built(name, layout)
    assert offers(flow(layout))[name].parameters == sum(p.numel() for p in seed.parameters())


@pytest.mark.parametrize(
    ("name", "layout", "multiplications"),
    [
        ("mlp", "features", 2 * 12 * 12),
        ("mlp", "tokens", 5 * 2 * 8 * 8),
        ("low_rank", "tokens", 5 * 2 * 8 * 4),
        ("low_rank", "conv2d", 30 * 2 * 8 * 4),
        ("conv", "conv1d", 9 * 2 * 8 * 8 * 3),
        ("conv", "conv2d", 30 * 2 * 8 * 8 * 9),
        ("depthwise", "conv2d", 30 * (8 * 9 + 8 * 8)),
        ("squeeze_excite", "conv2d", 2 * 8 * 2),
        ("attention", "tokens", 5 * (8 * 24 + 8 * 8) + 2 * 5 * 5 * 8),
    ],
)
def test_a_price_is_two_operations_for_each_product_of_one_sample(
    name: str, layout: str, multiplications: int
) -> None:
    assert offers(flow(layout))[name].flops == 2 * multiplications


def test_the_price_of_widening_is_that_of_the_branch() -> None:
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    found = offers(pair_flow(pair_of(*layers, source=(2, 3, 6, 6))))
    assert found.keys() == {"widen"}
    assert found["widen"].parameters == (3 * 4 * 9 + 4) + 4 * 5
    assert found["widen"].flops == 2 * 36 * (3 * 4 * 9 + 4 * 5)


def test_looking_for_offers_draws_no_random_number_and_takes_no_memory() -> None:
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    with unchanged_stream():
        offers(pair_flow(pair_of(*layers, source=(4, 6))))
        for layout in SHAPES:
            offers(flow(layout))
    huge = Flow((1, 400_000), torch.float32, CPU, -1)
    assert offers(huge)["mlp"].parameters == 2 * (400_000**2 + 400_000)


def test_what_a_slot_reports_is_offered_in_the_dtype_that_flows() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).double()
    slot = attach(model, "0", torch.randn(3, 4, dtype=torch.float64))
    assert sorted(offers(slot.flow)) == FITTING["features"]
