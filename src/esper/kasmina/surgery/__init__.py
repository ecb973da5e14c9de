"""Surgery on a live optimizer: groups, moments and schedule follow a model that grows."""

from esper.kasmina.surgery.surgeon import OptimizerSurgeon
from esper.kasmina.surgery.undo import Undo

__all__ = ["OptimizerSurgeon", "Undo"]
