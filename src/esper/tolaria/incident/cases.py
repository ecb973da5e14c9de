"""Incidents that are not finished, and the worker being asked to write them one after the other."""

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from esper.core.worker import Isolation
from esper.leyline import Level
from esper.tolaria.dependency import Answer, Dependency
from esper.tolaria.incident.record import FOLDER, Incident
from esper.tolaria.incident.writer import Evidence, NamedBatch, Written, rewrite, write_new
from esper.tolaria.recorder import Recorder

_UNDER_WAY = "under way"
# Of many skips in a row, the first batches tell most.
_MOST_BATCHES = 8


@dataclass
class Case:
    """An incident that is to be written, or that something is still to follow of.

    :param incident: the record so far.
    :param evidence: written with it.
    :ivar written: it is on the disk.
    :ivar lost: it could not be written.
    :ivar dirty: what is on the disk is not the newest.
    :ivar remedied: a rollback has taken back what led to it.
    :ivar losses: of the committed steps that have followed.
    :ivar further: batches of later verdicts, which are not on the disk yet.
    """

    incident: Incident
    evidence: Evidence
    written: bool = False
    lost: bool = False
    dirty: bool = False
    remedied: bool = False
    losses: list[float] = field(default_factory=list)
    further: list[NamedBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._max_batch_bytes = self.evidence.max_batch_bytes
        self._known = {entry.step for entry, _ in self.evidence.batches}

    @property
    def follows(self) -> bool:
        """Whether its outcome is still open."""
        return self.incident.followed.outcome == _UNDER_WAY

    @property
    def waits(self) -> bool:
        """Whether there is something to be written."""
        return not self.lost and (self.dirty or not self.written)

    def change(self, **changes: Any) -> None:  # noqa: ANN401 - fields of the record
        """Put a changed record in the place of the old one, which may just be being written."""
        self.incident = msgspec.structs.replace(self.incident, **changes)
        self.dirty = True

    def tell(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Followed
        """Add to what followed."""
        self.change(followed=msgspec.structs.replace(self.incident.followed, **changes))

    def add_batches(self, batches: list[NamedBatch]) -> None:
        """Have batches written that came under suspicion later."""
        for entry, content in batches:
            if entry.step not in self._known and len(self._known) < _MOST_BATCHES:
                self._known.add(entry.step)
                self.further.append((entry, content))
                self.dirty = True

    def take_further(self) -> Evidence:
        """Hand over the batches that are to be added; what is left of the limit is theirs."""
        kept = sum(entry.bytes for entry in self.incident.batches if entry.file)
        left, self.further = self.further, []
        return replace(self.evidence, batches=left, max_batch_bytes=self._max_batch_bytes - kept)

    def settle(self, outcome: str) -> None:
        """Decide the outcome, unless it has been decided."""
        if self.follows:
            after = statistics.median(self.losses) if self.losses else None
            self.tell(outcome=outcome, steps=len(self.losses), loss_after=after)


class Cases:
    """Has cases written beside training.

    :param directory: of the run.
    :param writer: how the worker is asked.
    :param recorder: told of each record that is there, and of each that could not be written.
    """

    def __init__(self, directory: Path, writer: Dependency, recorder: Recorder) -> None:
        self._directory = directory
        self._writer = writer
        self._recorder = recorder
        self._cases: list[Case] = []
        self._under_way: Case | None = None

    def add(self, case: Case) -> None:
        """Take in a case that is to be written."""
        self._cases.append(case)

    def attend(self) -> bool:
        """Take an answer if there is one, and ask for the next thing; return whether any is left.

        It does not wait.
        """
        self._take(self._writer.poll())
        if not self._writer.pending:
            self._submit()
        self._cases = [case for case in self._cases if case.waits or case.follows]
        return bool(self._cases) or self._writer.pending

    def close(self) -> None:
        """Have everything written; each is waited for until its deadline."""
        self._take(self._writer.wait())
        while any(case.waits for case in self._cases):
            if not self._submit():
                self._give_up("the worker does not take it")
                break
            self._take(self._writer.wait())

    def tell_failed(self, problem: str) -> None:
        """Say that something could not be written."""
        message = f"an incident could not be recorded: {problem}"
        self._recorder.event("incident_failed", message, Level.CRITICAL, error=problem)

    def _submit(self) -> bool:
        case = next((case for case in self._cases if case.waits), None)
        if case is None:
            return False
        function: Any = rewrite if case.written else write_new
        evidence = case.take_further() if case.written else case.evidence
        if not self._writer.submit_async(
            function, self._directory, case.incident, evidence, isolation=Isolation.THREAD
        ):
            if case.written:
                case.further = evidence.batches
            return False
        case.dirty = False
        self._under_way = case
        return True

    def _take(self, answer: Answer[Written] | None) -> None:
        case = self._under_way
        if answer is None or case is None:
            return
        self._under_way = None
        problem = answer.detail if answer.reply is None else answer.reply.problem
        if problem:
            self.tell_failed(problem)
            case.lost = not case.written
        elif answer.reply is not None:
            complete = answer.reply.incident
            # The record may have been added to meanwhile: only what the writer found out is taken.
            case.incident = msgspec.structs.replace(
                case.incident, state=complete.state, batches=complete.batches
            )
            if not case.written:
                case.written = True
                self._tell_recorded(complete)

    def _tell_recorded(self, complete: Incident) -> None:
        path = self._directory / FOLDER / complete.id
        self._recorder.event(
            "incident_recorded",
            f"incident at step {complete.step} is recorded in {path}",
            id=complete.id,
            path=str(path),
            state_step=complete.state.step,
            state_note=complete.state.note,
        )

    def _give_up(self, problem: str) -> None:
        for case in self._cases:
            if case.waits and not case.written:
                case.evidence.let_go()
                self.tell_failed(problem)
        self._cases = []
