"""The divergence guard: judges each step between backward pass and optimizer step."""

from esper.tolaria.guard.guard import Guard, NullGuard
from esper.tolaria.guard.statistics import RobustStatistics

__all__ = ["Guard", "NullGuard", "RobustStatistics"]
