"""Emergencies: a level that is raised, told, acted on and cleared."""

from esper.tolaria.emergency.broadcast import Broadcasts, Publish
from esper.tolaria.emergency.bucket import TokenBucket
from esper.tolaria.emergency.controller import EmergencyController, Escalation, Identity, Order
from esper.tolaria.emergency.word import EmergencyWord, WordState

__all__ = [
    "Broadcasts",
    "EmergencyController",
    "EmergencyWord",
    "Escalation",
    "Identity",
    "Order",
    "Publish",
    "TokenBucket",
    "WordState",
]
