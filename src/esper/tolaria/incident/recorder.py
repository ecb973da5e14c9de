"""Records every incident of a run while it happens, beside training.

What the loop pays in a healthy step is one append to a queue. The record and its evidence are
written by the worker; what follows is added to the record when it is known.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from esper.core.config import TolariaConfig
from esper.leyline import Action, Level, StepRecord, Verdict
from esper.tolaria.data import Batch, ResumableLoader
from esper.tolaria.dependency import Dependency
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.incident.cases import Case, Cases
from esper.tolaria.incident.course import Course, environment_of
from esper.tolaria.incident.record import (
    FOLDER,
    UNRECORDED,
    BatchEntry,
    Followed,
    Incident,
    Unrecorded,
    incident_directories,
    name_incident,
    number_of,
    trigger_of,
)
from esper.tolaria.incident.writer import Evidence, NamedBatch, write_unrecorded
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import Recovered
from esper.tolaria.rollback import FastRollbackCache

# Committed steps after which an incident counts as overcome, and that losses are compared over.
FOLLOWED_STEPS = 32
# Batches under suspicion whose content is held on to until the verdict.
_SUSPECTS = 4


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
        self._course = Course(config)
        self.course = self._course.records
        self.busy = False
        self._directory = directory
        self._job = job
        self._config = config
        self._sources = sources
        self._recorder = recorder
        self._cases = Cases(directory, writer, recorder)
        self._suspects: deque[tuple[int, Batch]] = deque(maxlen=_SUSPECTS)
        self._current: Case | None = None
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
            course = self._course.steps_from(incident.course[0].step)
            current.change(triggers=[*incident.triggers, trigger], course=course)
            current.add_batches(self._suspected_since(incident.suspect))
            current.losses = []
        else:
            if current is not None:
                current.settle("diverged again")
            self._current = self._take_down(record, verdict)
        self.busy = self._cases.attend()

    def rolled_back(self, recovered: Recovered) -> None:
        """Add what the rollback did."""
        update, result = self._recorder.update, recovered.rollback
        self._suspects.clear()
        self._course.note_restart(update)
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
        self.busy = self._cases.attend()

    def close(self) -> None:
        """Write what is not written yet; the run ends."""
        if self._current is not None:
            self._current.settle("run ended")
        self._cases.close()
        if self._unrecorded.count:
            path = self._directory / FOLDER / UNRECORDED
            problem = write_unrecorded(path, self._unrecorded)
            if problem:
                self._cases.tell_failed(problem)

    def _take_down(self, record: StepRecord, verdict: Verdict) -> Case | None:
        if self._number >= self._config.incidents.max_records:
            self._count_only(record.step)
            return None
        self._number += 1
        suspect = self._course.suspicion(record, verdict)
        evidence = self._evidence(suspect)
        kept_step = 0 if evidence.snapshot is None else evidence.snapshot.step
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
            course=self._course.steps_from(kept_step),
            restarts=dict(self._course.restarts),
            batches=[],
            guard=self._sources.guard.state_dict(),
            environment=environment_of(self._sources.model),
            settings=self._config.model_dump(mode="json"),
            followed=Followed(loss_before=self._course.loss_before(suspect, FOLLOWED_STEPS)),
        )
        case = Case(incident, evidence)
        self._cases.add(case)
        return case

    def _suspected_since(self, first: int) -> list[NamedBatch]:
        return [
            (BatchEntry(step, batch.epoch, batch.number, batch.samples), batch.content)
            for step, batch in self._suspects
            if step >= first
        ]

    def _evidence(self, suspect: int) -> Evidence:
        limits = self._config.incidents
        batches = self._suspected_since(suspect)
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


def _belongs(current: Case, record: StepRecord, verdict: Verdict) -> bool:
    """Whether a verdict is about an incident that is there already and not taken back yet."""
    incident = current.incident
    over = current.remedied or current.lost or not current.follows
    if over or record.attempt != incident.attempt:
        return False
    in_a_row = record.step <= incident.last_step + 1
    return in_a_row or 0 <= verdict.first_suspect <= incident.last_step


def _last_number(directory: Path) -> int:
    try:
        return max((number_of(path.name) for path in incident_directories(directory)), default=0)
    except OSError:
        # The folder cannot be read: writing will say so.
        return 0
