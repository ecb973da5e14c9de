"""Nissa: observability. The telemetry hub and its sinks; the run report."""

from esper.nissa.hub import NullHub, TelemetryHub
from esper.nissa.jsonl import JsonlSink, read_records

__all__ = ["JsonlSink", "NullHub", "TelemetryHub", "read_records"]
