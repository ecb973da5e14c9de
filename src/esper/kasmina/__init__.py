"""Kasmina: seeds that grow a live model, and the executor that lets them."""

from esper.kasmina.attach import attach, detach
from esper.kasmina.blueprints import Blueprint, Flow, register
from esper.kasmina.compiled import CompiledBlocks
from esper.kasmina.executor import Kasmina
from esper.kasmina.slot import Slot

__all__ = ["Blueprint", "CompiledBlocks", "Flow", "Kasmina", "Slot", "attach", "detach", "register"]
