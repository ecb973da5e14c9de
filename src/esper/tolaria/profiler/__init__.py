"""Profiles of a few training steps: recorded in bounded windows, written beside training."""

from esper.tolaria.profiler.names import SUFFIX, rank, trace_name
from esper.tolaria.profiler.profiler import Profiler
from esper.tolaria.profiler.recording import ProfilerError
from esper.tolaria.profiler.window import Phase, Window
from esper.tolaria.profiler.writer import Trace

__all__ = [
    "SUFFIX",
    "Phase",
    "Profiler",
    "ProfilerError",
    "Trace",
    "Window",
    "rank",
    "trace_name",
]
