"""Who is told of incidents: the interface, and the one that records none."""

from collections import deque
from typing import Protocol

from esper.leyline import StepRecord, Verdict
from esper.tolaria.data import Batch
from esper.tolaria.recovery import Recovered


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
