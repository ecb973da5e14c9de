"""Profiles of a few training steps: recorded in bounded windows, written beside training."""

from esper.tolaria.profiler.names import SUFFIX, rank, trace_name
from esper.tolaria.profiler.profiler import Profiler
from esper.tolaria.profiler.recording import ProfilerError
from esper.tolaria.profiler.requests import MOST_STEPS, Reply, RequestBox, RequestError
from esper.tolaria.profiler.watch import NoWatch, Watch, open_watch
from esper.tolaria.profiler.window import Phase, Window
from esper.tolaria.profiler.writer import Trace

__all__ = [
    "MOST_STEPS",
    "SUFFIX",
    "NoWatch",
    "Phase",
    "Profiler",
    "ProfilerError",
    "Reply",
    "RequestBox",
    "RequestError",
    "Trace",
    "Watch",
    "Window",
    "open_watch",
    "rank",
    "trace_name",
]
