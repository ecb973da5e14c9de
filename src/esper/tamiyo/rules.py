"""The default policy: ordered rules, each of which tells why."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec

from esper.leyline import (
    AdaptationCommand,
    Explanation,
    NoChange,
    Planting,
    SeedCommand,
    SystemState,
)
from esper.tamiyo.careful import CAREFUL
from esper.tamiyo.germination import germinate
from esper.tamiyo.lifecycle import LIFECYCLE
from esper.tamiyo.limits import RuleLimits
from esper.tamiyo.memory import Memory, is_structural
from esper.tamiyo.rate import cut_rate
from esper.tamiyo.risk import RiskEngine
from esper.tamiyo.view import Rule, View, several

_MOST_TOLD = 4


class Observer:
    """Takes in states, and keeps what the rules remember.

    :param limits: of the rules.
    """

    def __init__(self, limits: RuleLimits) -> None:
        self._limits = limits
        self._risk = RiskEngine(limits.risk)
        self._memory = Memory()
        self._before = Memory()

    def look(self, state: SystemState) -> View:
        """Take in a state and return what the rules are to see.

        The one seen last may be shown again, as a resumed run does: what was decided about it is
        forgotten then, and decided anew.
        """
        if not self._memory.is_stale(state):
            if self._memory.is_repeated(state):
                self._memory = self._before
            self._before = _copy(self._memory)
            self._memory.take(state, self._limits)
        risk = self._risk.assess(state.reports, state.step)
        return View(state, self._memory, self._limits, risk)

    def is_repeated(self, state: SystemState) -> bool:
        """Whether this is the state seen last."""
        return self._memory.is_repeated(state)

    def note(self, command: AdaptationCommand, state: SystemState) -> None:
        """Remember what was decided about the state seen last."""
        self._memory.note(command, state, self._limits)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, of JSON types."""
        return {
            "memory": msgspec.to_builtins(self._memory),
            "before": msgspec.to_builtins(self._before),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._memory = msgspec.convert(state_dict["memory"], Memory)
        self._before = msgspec.convert(state_dict["before"], Memory)


class RulesPolicy:
    """Grows a model before it has converged, and keeps only what pays.

    The rules are asked in this order, and the first one that knows something decides: change
    nothing in conservative mode, for a stale state, or while something is unmeasured; cull seeds
    in training that harm; let those blend in that gain; hold, fade out and cull those that harm as
    they blend; fossilise what is worth its price; germinate where the model under-fits or is slow;
    cut the rate of one that over-fits. Between two structural changes lies a window. Each answer
    says which rule decided, on what values, and what would have changed it.

    It answers at once: training waits for it, so that a seed loses no epoch.

    :param limits: what the rules compare with.
    :param planting: how seeds grow.
    """

    isolation = "thread"
    mode = "wait"

    def __init__(
        self, limits: RuleLimits | None = None, *, planting: Planting | None = None
    ) -> None:
        self.limits = limits or RuleLimits()
        self._observer = Observer(self.limits)
        self._rules: tuple[Rule, ...] = (
            *CAREFUL,
            *LIFECYCLE,
            partial(germinate, planting=planting),
            cut_rate,
        )

    def decide(self, state: SystemState) -> AdaptationCommand:
        """Answer with a command, or with no change; either explained."""
        view = self._observer.look(state)
        command = first(view, self._rules)
        self._observer.note(command, state)
        return command

    def observe(self, state: SystemState) -> None:
        """Take in a state that somebody else decides about."""
        self._observer.look(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, of JSON types."""
        return self._observer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._observer.load_state_dict(state_dict)


def first(view: View, rules: Iterable[Rule]) -> AdaptationCommand:
    """Return the first command that a rule gives and the window allows.

    Where there is none, no change is returned, with the obstacles of all rules.
    """
    obstacles: list[Explanation] = []
    return proposal(view, rules, obstacles) or NoChange(_summary(obstacles))


def proposal(
    view: View, rules: Iterable[Rule], obstacles: list[Explanation]
) -> AdaptationCommand | None:
    """Return the first command that a rule gives and the window allows, if there is one.

    :param obstacles: takes what stood in the way of others.
    """
    for rule in rules:
        for found in rule(view):
            if isinstance(found, Explanation):
                obstacles.append(found)
            elif view.window_left and is_structural(found, view.growth):
                obstacles.append(_postponed(view, found))
            else:
                return found
    return None


def _postponed(view: View, command: AdaptationCommand) -> Explanation:
    told = command.explanation or Explanation("", "")
    what = f"{command.operation} {command.seed!r}" if isinstance(command, SeedCommand) else "change"
    return msgspec.structs.replace(
        told,
        rule="window",
        reason=f"the last structural change is too recent to {what}",
        values=told.values | {"window_left": float(view.window_left)},
        thresholds=told.thresholds | {"window_left": 0.0},
        otherwise=f"{several(view.window_left, 'epoch')} more: {told.rule}, since {told.reason}",
    )


def _summary(obstacles: list[Explanation]) -> Explanation:
    """Merge the obstacles of several rules; the first one gives its name."""
    if not obstacles:
        return Explanation("no change", "no rule found anything to do", otherwise="another state")
    order = sorted(obstacles, key=lambda told: told.rule != "window")
    values: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    for told in reversed(order):
        values |= told.values
        thresholds |= told.thresholds
    told_first = order[:_MOST_TOLD]
    return Explanation(
        "window" if order[0].rule == "window" else "no change",
        "; ".join(told.reason for told in told_first),
        values,
        thresholds,
        "; ".join(f"{told.rule}: {told.otherwise}" for told in told_first),
    )


def _copy(memory: Memory) -> Memory:
    return msgspec.convert(msgspec.to_builtins(memory), Memory)
