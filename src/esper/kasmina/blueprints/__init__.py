"""Blueprints: what may grow in a slot, how it begins, and how it is folded away."""

from esper.kasmina.blueprints.base import Blueprint, Flow, Pair, WidenedPair
from esper.kasmina.blueprints.initialise import initialise, needs_gradient
from esper.kasmina.blueprints.plain import Grown, Residual, Seed
from esper.kasmina.blueprints.registry import get, names, offers, register

__all__ = [
    "Blueprint",
    "Flow",
    "Grown",
    "Pair",
    "Residual",
    "Seed",
    "WidenedPair",
    "get",
    "initialise",
    "names",
    "needs_gradient",
    "offers",
    "register",
]
