"""Tamiyo: policies that decide how training adapts."""

from esper.tamiyo.plateau import PlateauPolicy

__all__ = ["PlateauPolicy"]
