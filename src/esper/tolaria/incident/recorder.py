"""Records every incident of a run while it happens, beside training.

What the loop pays in a healthy step is one append to a queue. The record and its evidence are
written by the worker; what follows is added to the record when it is known.
"""

import platform
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import nn

from esper._version import __version__
from esper.core.config import TolariaConfig
from esper.core.worker import Isolation
from esper.leyline import Action, Level, StepRecord, Verdict
from esper.tolaria.data import Batch, ResumableLoader
from esper.tolaria.dependency import Answer, Dependency
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.incident.record import (
    FOLDER,
    UNRECORDED,
    BatchEntry,
    CourseStep,
    Environment,
    Followed,
    Incident,
    Unrecorded,
    course_step,
    incident_directories,
    name_incident,
    number_of,
    trigger_of,
)
from esper.tolaria.incident.writer import Evidence, Written, rewrite, write_new, write_unrecorded
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import Recovered
from esper.tolaria.rollback import FastRollbackCache

# Committed steps after which an incident counts as overcome, and that losses are compared over.
FOLLOWED_STEPS = 32
# Batches under suspicion whose content is held on to until the verdict.
_SUSPECTS = 4
_SHORTEST_COURSE = 256
_LONGEST_COURSE = 4096


@dataclass(frozen=True)
class Sources:
    """What an incident is told about.

    :param model: its device is noted.
    :param data: tells the samples of a batch.
    :param guard: its statistics are part of the record.
    :param snapshots: healthy states; None when none are kept.
    """

    model: nn.Module
    data: ResumableLoader
    guard: Guard | NullGuard
    snapshots: FastRollbackCache | None


@dataclass
class _Open:
    """An incident that is not finished: to be written, or with something still to follow."""

    incident: Incident
    evidence: Evidence
    written: bool = False
    dirty: bool = False
    remedied: bool = False
    losses: list[float] = field(default_factory=list)

    @property
    def follows(self) -> bool:
        return self.incident.followed.outcome == "under way"

    def tell(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Followed
        followed = msgspec.structs.replace(self.incident.followed, **changes)
        self.incident = msgspec.structs.replace(self.incident, followed=followed)
        self.dirty = True

    def settle(self, outcome: str) -> None:
        if self.follows:
            after = statistics.median(self.losses) if self.losses else None
            self.tell(outcome=outcome, steps=len(self.losses), loss_after=after)


class IncidentRecorder(Protocol):
    """Who is told of incidents.

    :ivar course: takes the record of every step.
    :ivar busy: whether :meth:`follow` wants to be called with the next step.
    """

    course: deque[StepRecord]
    busy: bool

    def suspect(self, step: int, batch: Batch) -> None:
        """Hold on to the batch of a step that the guard doubts."""
        ...

    def begin(self, record: StepRecord, verdict: Verdict) -> None:
        """Take down an incident, before anything is done about it."""
        ...

    def rolled_back(self, recovered: Recovered) -> None:
        """Add what the rollback did."""
        ...

    def halted(self, reason: str) -> None:
        """Add that the run is ended for it."""
        ...

    def follow(self, record: StepRecord) -> None:
        """Take in a step that follows."""
        ...

    def close(self) -> None:
        """Write what is not written yet; the run ends."""
        ...


class Incidents:
    """Records the incidents of one run.

    :param directory: of the run.
    :param job: name of the job.
    :param config: limits, and the settings that are part of each record.
    :param sources: what is recorded.
    :param writer: how the worker is asked to write.
    :param recorder: told of each record, tells the learning rate.
    """

    def __init__(
        self,
        directory: Path,
        job: str,
        config: TolariaConfig,
        sources: Sources,
        writer: Dependency,
        recorder: Recorder,
    ) -> None:
        self.course: deque[StepRecord] = deque(maxlen=_course_length(config))
        self.busy = False
        self._directory = directory
        self._job = job
        self._config = config
        self._sources = sources
        self._writer = writer
        self._recorder = recorder
        self._suspects: deque[tuple[int, Batch]] = deque(maxlen=_SUSPECTS)
        self._rates: dict[int, float] = {}
        self._restarts: dict[str, dict[str, Any]] = {}
        self._open: list[_Open] = []
        self._current: _Open | None = None
        self._under_way: _Open | None = None
        self._number = _last_number(directory)
        self._unrecorded = Unrecorded()

    def suspect(self, step: int, batch: Batch) -> None:
        """Hold on to the batch of a step that the guard doubts."""
        self._suspects.append((step, batch))

    def begin(self, record: StepRecord, verdict: Verdict) -> None:
        """Take down an incident, or another verdict of the same one."""
        current = self._current
        trigger = trigger_of(record.step, verdict)
        if current is not None and _belongs(current, record, verdict):
            incident = current.incident
            course = self._course(incident.course[0].step if incident.course else 0)
            current.incident = msgspec.structs.replace(
                incident, triggers=[*incident.triggers, trigger], course=course
            )
            current.dirty, current.losses = True, []
        else:
            if current is not None:
                current.settle("diverged again")
            self._current = self._take_down(record, verdict)
        self._attend()

    def rolled_back(self, recovered: Recovered) -> None:
        """Add what the rollback did."""
        update, result = self._recorder.update, recovered.rollback
        self._suspects.clear()
        attempt = self.course[-1].attempt + 1
        self._restarts[str(attempt)] = update.progress.state_dict()
        self._rates[attempt] = update.learning_rate
        if self._current is None:
            return
        self._current.remedied = True
        self._current.tell(
            tier="" if result.tier is None else result.tier.value,
            restored_step=result.step,
            latency_ms=result.latency_ms,
            skipped=list(recovered.skipped),
            learning_rate=update.learning_rate,
            note=result.error,
        )

    def halted(self, reason: str) -> None:
        """Add that the run is ended for it."""
        if self._current is not None:
            self._current.tell(note=reason)
            self._current.settle("halted")

    def follow(self, record: StepRecord) -> None:
        """Take in a step that follows, and ask the worker for what is left to be written."""
        current = self._current
        if current is not None and current.follows and record.action == Action.COMMIT.value:
            current.losses.append(record.loss)
            if len(current.losses) >= FOLLOWED_STEPS:
                current.settle("recovered")
        self._attend()

    def close(self) -> None:
        """Write what is not written yet; the run ends."""
        if self._current is not None:
            self._current.settle("run ended")
        self._take(self._writer.wait())
        while self._next() is not None:
            if not self._submit():
                self._give_up("the worker does not take it")
                break
            self._take(self._writer.wait())
        if self._unrecorded.count:
            path = self._directory / FOLDER / UNRECORDED
            problem = write_unrecorded(path, self._unrecorded)
            if problem:
                self._failed(problem)

    def _take_down(self, record: StepRecord, verdict: Verdict) -> _Open | None:
        if self._number >= self._config.incidents.max_records:
            self._count_only(record.step)
            return None
        self._number += 1
        suspect = self._suspicion(record, verdict)
        evidence = self._evidence(suspect)
        kept_step = 0 if evidence.snapshot is None else evidence.snapshot.step
        before = [
            step.loss
            for step in self._latest().values()
            if step.step < suspect and step.action == Action.COMMIT.value
        ][-FOLLOWED_STEPS:]
        followed = Followed(loss_before=statistics.median(before) if before else None)
        incident = Incident(
            id=name_incident(self._number, record.step),
            run=self._directory.name,
            job=self._job,
            time=time.time(),
            step=record.step,
            suspect=suspect,
            attempt=record.attempt,
            epoch=record.epoch,
            batch=record.batch,
            triggers=[trigger_of(record.step, verdict)],
            course=self._course(kept_step),
            restarts=dict(self._restarts),
            batches=[],
            guard=self._sources.guard.state_dict(),
            environment=environment_of(self._sources.model),
            settings=self._config.model_dump(mode="json"),
            followed=followed,
        )
        opened = _Open(incident, evidence)
        self._open.append(opened)
        return opened

    def _suspicion(self, record: StepRecord, verdict: Verdict) -> int:
        """Return the step at which the suspicion began."""
        if verdict.first_suspect >= 0:
            return verdict.first_suspect
        first = record.step
        for earlier in reversed(self.course):
            if earlier.attempt != record.attempt or not earlier.suspicious:
                break
            first = earlier.step
        return first

    def _evidence(self, suspect: int) -> Evidence:
        limits = self._config.incidents
        batches = [
            (BatchEntry(step, batch.epoch, batch.number, batch.samples), batch.content)
            for step, batch in self._suspects
            if step >= suspect
        ]
        wanted = suspect - self._config.guard.margin
        evidence = Evidence(None, suspect, batches, int(limits.max_batch_megabytes * 2**20))
        cache = self._sources.snapshots
        snapshot = None
        if cache is not None:
            # A state that is older than the first doubt by a margin, if there is one: the steps in
            # between then tell what is usual.
            snapshot = cache.get_nearest(wanted) or cache.get_nearest(suspect)
        if snapshot is None:
            evidence.note = f"no healthy snapshot of step {suspect} or earlier"
        elif snapshot.nbytes > limits.max_state_megabytes * 2**20:
            evidence.note = (
                f"the state's {snapshot.nbytes / 2**20:.1f} MiB are more than "
                f"incidents.max_state_megabytes ({limits.max_state_megabytes:g})"
            )
        else:
            evidence.snapshot = snapshot.hold()
        return evidence

    def _latest(self) -> dict[int, StepRecord]:
        """Return the records of the present course by step: what was taken back is left out."""
        last = self.course[-1].step
        latest = {record.step: record for record in self.course if record.step <= last}
        return dict(sorted(latest.items()))

    def _course(self, first: int) -> list[CourseStep]:
        steps, before = [], None
        for step, record in self._latest().items():
            rate = self._rates.get(record.attempt)
            if before is not None and before.attempt == record.attempt:
                rate = before.learning_rate
            before = record
            if step >= first:
                steps.append(course_step(record, rate))
        return steps

    def _count_only(self, step: int) -> None:
        counted = self._unrecorded
        if not counted.count:
            counted.first_step = step
            limit = self._config.incidents.max_records
            message = (
                f"incident at step {step} is counted only: the run has {self._number} records "
                f"(incidents.max_records = {limit}), and the first ones tell most"
            )
            self._recorder.event("incident_not_recorded", message, Level.WARNING, limit=limit)
        counted.count += 1
        counted.last_step = step

    def _attend(self) -> None:
        """Take an answer if there is one, ask for the next thing, and see what is left."""
        self._take(self._writer.poll())
        if not self._writer.pending:
            self._submit()
        self._open = [o for o in self._open if o.dirty or not o.written or o.follows]
        self.busy = bool(self._open) or self._writer.pending

    def _next(self) -> _Open | None:
        return next((o for o in self._open if o.dirty or not o.written), None)

    def _submit(self) -> bool:
        opened = self._next()
        if opened is None:
            return False
        arguments: tuple[Any, ...] = (self._directory, opened.incident)
        function: Any = rewrite
        if not opened.written:
            function, arguments = write_new, (*arguments, opened.evidence)
        if not self._writer.submit_async(function, *arguments, isolation=Isolation.THREAD):
            return False
        opened.dirty = False
        self._under_way = opened
        return True

    def _take(self, answer: Answer[Written] | None) -> None:
        opened = self._under_way
        if answer is None or opened is None:
            return
        self._under_way = None
        problem = answer.detail if answer.reply is None else answer.reply.problem
        if problem:
            self._failed(problem)
            if not opened.written:
                self._drop(opened)
            return
        if answer.reply is not None and not opened.written:
            opened.written = True
            self._recorded(opened, answer.reply.incident)

    def _recorded(self, opened: _Open, complete: Incident) -> None:
        opened.incident = msgspec.structs.replace(
            opened.incident, state=complete.state, batches=complete.batches
        )
        path = self._directory / FOLDER / complete.id
        self._recorder.event(
            "incident_recorded",
            f"incident at step {complete.step} is recorded in {path}",
            id=complete.id,
            path=str(path),
            state_step=complete.state.step,
            state_note=complete.state.note,
        )

    def _failed(self, problem: str) -> None:
        message = f"an incident could not be recorded: {problem}"
        self._recorder.event("incident_failed", message, Level.CRITICAL, error=problem)

    def _drop(self, opened: _Open) -> None:
        self._open = [other for other in self._open if other is not opened]
        if self._current is opened:
            self._current = None

    def _give_up(self, problem: str) -> None:
        for opened in self._open:
            if not opened.written:
                opened.evidence.let_go()
                self._failed(problem)
        self._open = []


class NoIncidents:
    """Records nothing.

    :ivar course: keeps nothing.
    :ivar busy: never.
    """

    def __init__(self) -> None:
        self.course: deque[StepRecord] = deque(maxlen=0)
        self.busy = False

    def suspect(self, step: int, batch: Batch) -> None:
        """Do nothing."""

    def begin(self, record: StepRecord, verdict: Verdict) -> None:
        """Do nothing."""

    def rolled_back(self, recovered: Recovered) -> None:
        """Do nothing."""

    def halted(self, reason: str) -> None:
        """Do nothing."""

    def follow(self, record: StepRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def environment_of(model: nn.Module) -> Environment:
    """Return what arithmetic depends on at present."""
    first = next(iter(model.parameters()), None)
    return Environment(
        esper=__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        device="cpu" if first is None else str(first.device),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        matmul_precision=torch.get_float32_matmul_precision(),
    )


def _belongs(current: _Open, record: StepRecord, verdict: Verdict) -> bool:
    """Whether a verdict is about an incident that is there already and not taken back yet."""
    incident = current.incident
    if current.remedied or not current.follows or record.attempt != incident.attempt:
        return False
    in_a_row = record.step <= incident.last_step + 1
    return in_a_row or 0 <= verdict.first_suspect <= incident.last_step


def _course_length(config: TolariaConfig) -> int:
    between = config.snapshots.every if config.snapshots.enabled else config.checkpoints.every
    wanted = 2 * between + 2 * config.guard.margin + config.guard.window
    return min(max(wanted, _SHORTEST_COURSE), _LONGEST_COURSE)


def _last_number(directory: Path) -> int:
    try:
        return max((number_of(path.name) for path in incident_directories(directory)), default=0)
    except OSError:
        # The folder cannot be read: writing will say so.
        return 0
