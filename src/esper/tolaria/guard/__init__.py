"""The divergence guard: judges each step between backward pass and optimizer step.

``GuardedTraining``, for loops of one's own, is in :mod:`esper.tolaria.guard.own_loop`: it needs
parts of the engine that themselves need the guard.
"""

from esper.tolaria.guard.guard import Guard, NullGuard
from esper.tolaria.guard.statistics import RobustStatistics

__all__ = ["Guard", "NullGuard", "RobustStatistics"]
