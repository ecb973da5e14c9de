"""Tamiyo: policies that decide how training adapts."""

from esper.tamiyo.bandit import BanditLimits, BanditPolicy
from esper.tamiyo.fixed import Entry, NoPolicy, SchedulePolicy, grow_periodically
from esper.tamiyo.limits import RuleLimits
from esper.tamiyo.plateau import PlateauPolicy
from esper.tamiyo.remote import RemotePolicy
from esper.tamiyo.risk import Risk, RiskEngine, RiskLimits
from esper.tamiyo.rules import RulesPolicy
from esper.tamiyo.wire import PolicyReply, PolicyRequest

__all__ = [
    "BanditLimits",
    "BanditPolicy",
    "Entry",
    "NoPolicy",
    "PlateauPolicy",
    "PolicyReply",
    "PolicyRequest",
    "RemotePolicy",
    "Risk",
    "RiskEngine",
    "RiskLimits",
    "RuleLimits",
    "RulesPolicy",
    "SchedulePolicy",
    "grow_periodically",
]
