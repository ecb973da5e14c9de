"""Aggregation: several losses, one update. Each algorithm is a file of its own."""

from esper.tolaria.aggregation.backward import backward, gramian
from esper.tolaria.aggregation.base import Aggregator
from esper.tolaria.aggregation.linear import Mean, Sum, Weighted
from esper.tolaria.aggregation.pcgrad import PCGrad
from esper.tolaria.aggregation.report import ConflictReport

__all__ = [
    "Aggregator",
    "ConflictReport",
    "Mean",
    "PCGrad",
    "Sum",
    "Weighted",
    "backward",
    "gramian",
]
