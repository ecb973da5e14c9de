"""Policies that were decided beforehand: none at all, and a schedule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from esper.leyline import (
    AdaptationCommand,
    ConfigError,
    Explanation,
    GrowthState,
    NoChange,
    Planting,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
    SystemState,
)
from esper.tamiyo.careful import CONSERVATIVE

# An answer that missed its deadline is never reported on.
_PATIENCE_EPOCHS = 3
_LIVE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})
_POSSIBLE: dict[SeedOperation, frozenset[Stage]] = {
    SeedOperation.GERMINATE: frozenset({Stage.DORMANT}),
    SeedOperation.ADVANCE: frozenset({Stage.TRAINING, Stage.HOLDING}),
    SeedOperation.HOLD: frozenset({Stage.BLENDING}),
    SeedOperation.RETARGET: frozenset({Stage.HOLDING}),
    SeedOperation.CULL: _LIVE,
}


class NoPolicy:
    """Leaves training as it is."""

    isolation = "thread"
    mode = "wait"

    def decide(self, state: SystemState) -> NoChange:
        """Answer that nothing is to be changed."""
        told = Explanation(
            "none",
            "this run is not to be adapted",
            {"epoch": float(state.epoch)},
            otherwise="another policy",
        )
        return NoChange(told)


@dataclass(frozen=True)
class Entry:
    """One command of a schedule, and when it falls due.

    :param command: what to do.
    :param epoch: at the end of which epoch, from 0; None where the step says when.
    :param step: after how many steps; None where the epoch says when.
    :raises ConfigError: not just one of epoch and step is given, or it is negative.
    """

    command: AdaptationCommand
    epoch: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if (self.epoch is None) == (self.step is None):
            raise ConfigError(
                f"entry {self.command!r}: epoch is {self.epoch}, step is {self.step}; give one"
            )
        if (self.epoch or self.step or 0) < 0:
            raise ConfigError(f"entry {self.command!r} is due before training; give 0 or more")

    def is_due(self, state: SystemState) -> bool:
        """Whether its time has come."""
        if self.epoch is not None:
            return state.epoch >= self.epoch
        return self.step is not None and state.step >= self.step

    @property
    def when(self) -> str:
        """When it falls due, in words."""
        return f"step {self.step}" if self.epoch is None else f"the end of epoch {self.epoch + 1}"


class _Progress(msgspec.Struct):
    """What became of one entry.

    :ivar asked: epoch and step of the state at which it was asked for; None before.
    :ivar tries: how often it was.
    :ivar over: it was carried out, or given up.
    """

    asked: tuple[int, int] | None = None
    tries: int = 0
    over: bool = False


class SchedulePolicy:
    """Asks for fixed commands at fixed times.

    An entry that falls due while its seed's stage does not allow it waits until it does; the
    entries of a seed keep their order. One that is refused is asked for again.

    :param entries: in order.
    :param tries: how often an entry is asked for.
    """

    isolation = "thread"
    mode = "wait"

    def __init__(self, entries: Iterable[Entry], *, tries: int = 5) -> None:
        self._entries = tuple(entries)
        self._tries = tries
        self._progress = [_Progress() for _ in self._entries]

    def decide(self, state: SystemState) -> AdaptationCommand:
        """Answer with the first command that is due and possible."""
        self._settle(state)
        waiting: list[str] = []
        blocked: set[str] = set()
        for entry, progress in zip(self._entries, self._progress, strict=True):
            if progress.over:
                continue
            seed = entry.command.seed if isinstance(entry.command, SeedCommand) else ""
            obstacle = self._obstacle(entry, progress, state)
            if not obstacle and seed not in blocked:
                return self._ask(entry, progress, state)
            waiting.append(obstacle or f"{_what(entry)} follows on it")
            if seed:
                blocked.add(seed)
        otherwise = "; ".join(waiting[:3]) or "more entries in the schedule"
        reason = "nothing is due" if waiting else "the schedule is over"
        values = {"epoch": float(state.epoch), "step": float(state.step)}
        return NoChange(Explanation("schedule", reason, values, otherwise=otherwise))

    def state_dict(self) -> dict[str, Any]:
        """Return what became of the entries, of JSON types."""
        return {"progress": msgspec.to_builtins(self._progress)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`.

        :raises ConfigError: it is that of another schedule.
        """
        progress = msgspec.convert(state_dict["progress"], list[_Progress])
        if len(progress) != len(self._entries):
            raise ConfigError(
                f"the saved schedule has {len(progress)} entries, this one {len(self._entries)}; "
                "continue with the schedule that the run began with"
            )
        self._progress = progress

    def _settle(self, state: SystemState) -> None:
        """Find out from the reports what was carried out and what was refused."""
        for entry, progress in zip(self._entries, self._progress, strict=True):
            command, asked = entry.command, progress.asked
            if progress.over or asked is None or not isinstance(command, SeedCommand):
                continue
            told = _told(state, command, asked[1])
            if told:
                progress.over = told[-1] or progress.tries >= self._tries
                progress.asked = None
            elif state.epoch - asked[0] > _PATIENCE_EPOCHS:
                progress.over, progress.asked = progress.tries >= self._tries, None

    def _obstacle(self, entry: Entry, progress: _Progress, state: SystemState) -> str:
        """Return why an entry cannot be asked for now; empty when it can."""
        what = _what(entry)
        if not entry.is_due(state):
            return f"{what} is due at {entry.when}"
        if progress.asked is not None:
            return f"there is no word of {what} yet"
        command = entry.command
        if not isinstance(command, SeedCommand):
            return ""
        growth = state.growth
        seed = None if growth is None else growth.seeds.get(command.seed)
        if growth is None or seed is None:
            return f"{what} waits for a slot of that name"
        if state.metrics.get(CONSERVATIVE) == 1.0:
            return f"{what} waits for the end of conservative mode"
        if seed.stage not in _POSSIBLE[command.operation]:
            return f"{what} waits, since it is {seed.stage}"
        if command.operation is SeedOperation.GERMINATE:
            return _unaffordable(what, command.blueprint, seed, growth)
        return ""

    def _ask(self, entry: Entry, progress: _Progress, state: SystemState) -> AdaptationCommand:
        progress.tries += 1
        if isinstance(entry.command, SeedCommand):
            progress.asked = state.epoch, state.step
        else:
            progress.over = True
        told = Explanation(
            "schedule",
            f"{_what(entry)} was due at {entry.when}",
            {"epoch": float(state.epoch), "step": float(state.step)},
            otherwise="another schedule",
        )
        return msgspec.structs.replace(entry.command, explanation=told)


def grow_periodically(
    slots: Sequence[str],
    blueprint: str,
    every: int,
    *,
    start: int = 1,
    planting: Planting | None = None,
) -> list[Entry]:
    """Return a schedule that grows one slot after the other, at fixed intervals.

    Each seed is asked to go on as soon as it may: from training to blending, then for good.

    :param slots: in order.
    :param blueprint: what grows in each.
    :param every: epochs from one germination to the next.
    :param start: epoch at the end of which the first germinates, from 0.
    :param planting: how they grow.
    :raises ConfigError: ``every`` is below 1.
    """
    if every < 1:
        raise ConfigError(f"every is {every}; give 1 epoch or more")
    entries = []
    for index, slot in enumerate(slots):
        epoch = start + index * every
        germinate = SeedCommand(
            slot, SeedOperation.GERMINATE, blueprint=blueprint, planting=planting or Planting()
        )
        advance = SeedCommand(slot, SeedOperation.ADVANCE)
        entries.append(Entry(germinate, epoch))
        entries.append(Entry(advance, epoch + 1))
        entries.append(Entry(advance, epoch + 2))
    return entries


def _told(state: SystemState, command: SeedCommand, step: int) -> list[bool]:
    """Return of each report on a command since a step whether it was carried out."""
    return [
        report.applied
        for report in state.reports
        if report.seed == command.seed
        and report.operation == command.operation
        and report.step >= step
    ]


def _what(entry: Entry) -> str:
    command = entry.command
    if isinstance(command, SeedCommand):
        return f"{command.operation} {command.seed!r}"
    return type(command).__name__


def _unaffordable(what: str, blueprint: str, seed: SeedState, growth: GrowthState) -> str:
    if seed.embargo_left > 0:
        return f"{what} waits for the end of its embargo"
    offer, budget = seed.offers.get(blueprint), growth.parameter_budget
    total = growth.parameters + (offer.parameters if offer else 0)
    if budget is not None and total > budget:
        return f"{what} waits for a budget of {total:,} parameters"
    return ""
