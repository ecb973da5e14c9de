"""Aggregation: several losses, one update. Each algorithm is a file of its own."""

from esper.tolaria.aggregation.attribution import losses_by_task
from esper.tolaria.aggregation.backward import MicroBatches, backward
from esper.tolaria.aggregation.base import Aggregator
from esper.tolaria.aggregation.flat import (
    aggregate_weighted,
    combine_flat_grads,
    flat_to_grads,
    grads_to_flat,
)
from esper.tolaria.aggregation.groups import by_layer, by_name
from esper.tolaria.aggregation.linear import Mean, Sum, Weighted
from esper.tolaria.aggregation.measure import measure_modes
from esper.tolaria.aggregation.native import describe as describe_kernels
from esper.tolaria.aggregation.pcgrad import PCGrad
from esper.tolaria.aggregation.pull import MODES, Mode
from esper.tolaria.aggregation.refreshed import Refreshed
from esper.tolaria.aggregation.report import ConflictReport
from esper.tolaria.aggregation.torchjd import TorchJDWeighting

__all__ = [
    "MODES",
    "Aggregator",
    "ConflictReport",
    "Mean",
    "MicroBatches",
    "Mode",
    "PCGrad",
    "Refreshed",
    "Sum",
    "TorchJDWeighting",
    "Weighted",
    "aggregate_weighted",
    "backward",
    "by_layer",
    "by_name",
    "combine_flat_grads",
    "describe_kernels",
    "flat_to_grads",
    "grads_to_flat",
    "losses_by_task",
    "measure_modes",
]
