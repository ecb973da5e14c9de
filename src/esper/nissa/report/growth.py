"""How a model grew in a run, read from its records in the order in which they were written.

A rollback or a resume takes back what came after the state that it went back to: such changes are
kept apart, as courses that were taken back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from esper.leyline import Event, Explanation, FieldReport, Record, Stage, StepRecord, SystemState

LIVE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})


@dataclass(frozen=True)
class Change:
    """One change of a seed's stage, and why.

    :param step: steps taken when it happened.
    :param decision: of the policy, where it led to this.
    """

    step: int
    report: FieldReport
    decision: Explanation | None = None

    @property
    def reason(self) -> str:
        """What the gates measured, or else why the policy wanted it."""
        told = "; ".join(gate.reason for gate in self.report.gates)
        if self.decision is not None and not told:
            return self.decision.reason
        return told


@dataclass
class Decision:
    """One answer of the policy.

    :param step: steps taken when it was taken in.
    :param kind: the command's tag.
    :ivar outcome: what came of the command.
    :ivar lost: whether a rollback or a resume has taken it back.
    """

    step: int
    kind: str
    explanation: Explanation
    outcome: FieldReport | None = None
    lost: bool = False

    @property
    def is_change(self) -> bool:
        """Whether it asked for anything."""
        return self.kind != "no_change"


@dataclass(frozen=True)
class Course:
    """Steps that were taken back, and what had happened to seeds in them.

    :param first: steps taken in the state that was gone back to.
    :param last: steps that had been taken.
    :param cause: ``rollback`` or ``resume``.
    :param changes: after ``first``.
    """

    first: int
    last: int
    cause: str
    changes: list[Change]


@dataclass
class GrowthStory:
    """Everything that a report tells about growth.

    :ivar changes: those that count, oldest first.
    :ivar courses: what was taken back, oldest first.
    :ivar refused: commands that were not carried out.
    :ivar decisions: of the policy, oldest first.
    :ivar parameters: steps taken and parameters of the model then, wherever they were told.
    :ivar states: of the epochs that count.
    :ivar now: steps taken in the last record.
    """

    changes: list[Change] = field(default_factory=list)
    courses: list[Course] = field(default_factory=list)
    refused: list[FieldReport] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    parameters: list[tuple[int, int]] = field(default_factory=list)
    states: list[SystemState] = field(default_factory=list)
    now: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)
    _restored: list[FieldReport] = field(default_factory=list)

    @property
    def present(self) -> bool:
        """Whether there was anything that could grow."""
        lost = any(course.changes for course in self.courses)
        return bool(self.states or self.changes or self.refused or lost)

    @property
    def slots(self) -> list[str]:
        """Names of the slots, in the order in which the run names them."""
        names = [name for state in self.states[-1:] for name in _seeds(state)]
        told = [change.report.seed for change in self.changes]
        lost = [change.report.seed for course in self.courses for change in course.changes]
        return list(dict.fromkeys([*names, *told, *lost]))

    def take(self, record: Record) -> None:
        """Read the next record."""
        if isinstance(record, StepRecord):
            self.now = record.step + 1
        elif isinstance(record, SystemState):
            self._take_state(record)
        else:
            read = _READERS.get(record.name)
            if read is not None:
                read(self, record)

    def stage_at(self, slot: str, step: int) -> Stage:
        """Return the stage of a slot after so many steps, by the changes that count."""
        for change in reversed(self.changes):
            if change.report.seed == slot and change.step <= step:
                return change.report.after or Stage.DORMANT
        return Stage.DORMANT

    def _take_state(self, state: SystemState) -> None:
        if state.growth is None:
            return
        self.now = state.step
        self.states.append(state)
        self.parameters.append((state.step, state.growth.parameters))
        for name, seed in state.growth.seeds.items():
            if seed.parameters:
                self._sizes[name] = seed.parameters

    def _start(self, event: Event) -> None:
        if not self.parameters and isinstance(event.data.get("parameters"), int):
            self.parameters.append((0, event.data["parameters"]))

    def _take_change(self, event: Event) -> None:
        report = report_of(event)
        if report is None or not report.seed:
            return
        if report.command == "rollback":
            # Told before the rollback itself is.
            self._restored.append(report)
            return
        self.now = max(self.now, event.step)
        decision = self._settle(report)
        explanation = None if decision is None else decision.explanation
        self.changes.append(Change(event.step, report, explanation))
        self._count(event.step, report)

    def _take_refusal(self, event: Event) -> None:
        report = report_of(event)
        if report is not None:
            self.refused.append(report)
            self._settle(report)

    def _take_answer(self, event: Event) -> None:
        report = report_of(event)
        if report is not None:
            self._settle(report)

    def _take_decision(self, event: Event) -> None:
        explanation = explanation_of(event)
        if explanation is not None:
            kind = str(event.data.get("decision", ""))
            self.decisions.append(Decision(event.step, kind, explanation))

    def _settle(self, report: FieldReport) -> Decision | None:
        """Find the decision that a report answers, and tell it what came of it."""
        waiting = [d for d in self.decisions if d.kind == report.command and d.outcome is None]
        named = [d for d in waiting if report.seed and repr(report.seed) in d.explanation.reason]
        found = (named or (waiting if len(waiting) == 1 else []))[-1:]
        for decision in found:
            decision.outcome = report
            return decision
        return None

    def _count(self, step: int, report: FieldReport) -> None:
        """Keep the number of parameters between two epochs, where the change tells it."""
        before = self.parameters[-1][1] if self.parameters else None
        if before is None:
            return
        if report.before is Stage.DORMANT and report.after in LIVE:
            added = [gate.values["added"] for gate in report.gates if "added" in gate.values]
            for value in added[:1]:
                self._sizes[report.seed] = int(value)
                self.parameters.append((step, before + int(value)))
        elif report.after is Stage.CULLED:
            self.parameters.append((step, before - self._sizes.pop(report.seed, 0)))

    def _roll_back(self, event: Event) -> None:
        self._go_back(event.data["to_step"], event.data["from_step"] + 1, "rollback")

    def _resume(self, event: Event) -> None:
        self._go_back(event.data["from_step"], self.now, "resume")

    def _go_back(self, first: int, last: int, cause: str) -> None:
        lost = [change for change in self.changes if change.step > first]
        if last > first:
            self.courses.append(Course(first, last, cause, lost))
        self._forget(first)
        for decision in self.decisions:
            decision.lost |= decision.step > first
        for report in self._restored:
            if self.stage_at(report.seed, first) is not report.after:
                self.changes.append(Change(first, report))
        self._restored = []
        self.now = first

    def _forget(self, first: int) -> None:
        """Leave out what came after so many steps."""
        self.changes = [change for change in self.changes if change.step <= first]
        self.states = [state for state in self.states if state.step <= first]
        self.parameters = [point for point in self.parameters if point[0] <= first]


_READERS: dict[str, Callable[[GrowthStory, Event], None]] = {
    "run_started": GrowthStory._start,
    "run_resumed": GrowthStory._resume,
    "rollback": GrowthStory._roll_back,
    "seed_changed": GrowthStory._take_change,
    "seed_refused": GrowthStory._take_refusal,
    "policy_answered": GrowthStory._take_answer,
    "policy_decided": GrowthStory._take_decision,
}


def report_of(event: Event) -> FieldReport | None:
    """Return the report that an event carries, without values that are no numbers.

    None when it carries none: then the event is in the list of events only.
    """
    gates = [gate | {"values": _numbers(gate.get("values"))} for gate in _dicts(event, "gates")]
    try:
        return msgspec.convert(event.data | {"gates": gates}, FieldReport)
    except msgspec.ValidationError:
        return None


def explanation_of(event: Event) -> Explanation | None:
    """Return why a policy decided so, without values that are no numbers; None if untold."""
    numbers = {key: _numbers(event.data.get(key)) for key in ("values", "thresholds")}
    try:
        return msgspec.convert(event.data | numbers, Explanation)
    except msgspec.ValidationError:
        return None


def _seeds(state: SystemState) -> Iterable[str]:
    return () if state.growth is None else state.growth.seeds


def _dicts(event: Event, key: str) -> list[dict[str, Any]]:
    found = event.data.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _numbers(values: object) -> dict[str, float]:
    """Keep what is a number: one that is not finite is written as null, or as its name."""
    if not isinstance(values, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
