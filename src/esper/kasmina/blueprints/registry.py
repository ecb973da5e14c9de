"""Blueprints by name: our own, and those that installed packages offer."""

import difflib
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.blueprints.base import Blueprint, Flow
from esper.kasmina.blueprints.convolutional import Attention, ConvResidual, Depthwise, Excitation
from esper.kasmina.blueprints.dense import LinearBottleneck, Mlp
from esper.kasmina.blueprints.low_rank import LowRank
from esper.kasmina.blueprints.widen import Widen
from esper.kasmina.probe import kept_random
from esper.leyline import GrowthError, Offer

GROUP = "esper.blueprints"
_registered: dict[str, Blueprint] = {}


def register(blueprint: Blueprint) -> None:
    """Make a blueprint known by its name.

    :raises GrowthError: the name is taken by another one.
    """
    known = _registered.get(blueprint.name)
    if known is not None and type(known) is not type(blueprint):
        raise GrowthError(f"there is a blueprint {blueprint.name!r} already; choose another name")
    _registered[blueprint.name] = blueprint


def get(name: str) -> Blueprint:
    """Return a blueprint by name, also from an installed package's entry point.

    What is registered under a name goes before what a package offers under it.

    :raises GrowthError: there is none, naming the nearest; or its package cannot be loaded; or
        packages offer several.
    """
    if name in _registered:
        return _registered[name]
    points = _points()
    if name not in points:
        nearest = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(names())}"
        raise GrowthError(f"there is no blueprint {name!r}; {hint}")
    register(_load(_only(name, points[name])))
    return _registered[name]


def names() -> list[str]:
    """Return the names of all blueprints, sorted."""
    return sorted({*_registered, *_points()})


def offers(flow: Flow) -> dict[str, Offer]:
    """Return what each blueprint that fits would add, with its default arguments.

    Those of packages that cannot be loaded, or build nothing that works, are left out; asking for
    one by name tells why. No random stream is touched, and nothing is computed.
    """
    found = {}
    with kept_random():
        for name in names():
            try:
                blueprint = get(name)
                blueprint.check(flow)
                found[name] = _price(blueprint, flow)
            except GrowthError:
                continue
    return found


def _price(blueprint: Blueprint, flow: Flow) -> Offer:
    shape = flow.shape if flow.pair is None else flow.pair.source_shape
    meta = torch.device("meta")
    # Made where nothing is computed, so that it takes no memory.
    with meta, torch.no_grad(), FlopCounterMode(display=False) as counter:
        seed = blueprint.build(replace(flow, device=meta)).eval()
        source = torch.empty((1, *shape[1:]), dtype=flow.dtype)
        try:
            given = seed(source).shape
        except Exception as error:  # whatever a package's own code may raise
            raise GrowthError(f"a seed of blueprint {blueprint.name!r} fails: {error}") from error
    if given[1:] != flow.shape[1:]:
        raise GrowthError(f"a seed of blueprint {blueprint.name!r} gives {given}")
    return Offer(_size(seed), float(counter.get_total_flops()))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def _points() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _only(name: str, points: list[EntryPoint]) -> EntryPoint:
    """Return the one that is offered: which of several it is must not depend on the machine."""
    places = sorted({point.value for point in points})
    if len(places) > 1:
        raise GrowthError(
            f"blueprint {name!r} is offered by {' and '.join(places)}; uninstall all but one of "
            "the packages, or register() the one that is meant"
        )
    return points[0]


def _load(point: EntryPoint) -> Blueprint:
    try:
        made = point.load()
        blueprint = made() if isinstance(made, type) else made
    except Exception as error:
        raise GrowthError(
            f"blueprint {point.name!r} of {point.value} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(blueprint, Blueprint) or blueprint.name != point.name:
        raise GrowthError(f"{point.value} is no blueprint of the name {point.name!r}")
    return blueprint


for _made in (
    Attention(),
    ConvResidual(),
    Depthwise(),
    Excitation(),
    LinearBottleneck(),
    LowRank(),
    Mlp(),
    Widen(),
):
    register(_made)
