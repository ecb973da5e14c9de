"""How a run ends."""

from enum import StrEnum


class Outcome(StrEnum):
    """What has become of a run."""

    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    HALTED = "halted"
    FAILED = "failed"


class Ending:
    """Asked by a person, a signal or the guard; heeded by the loop after the current step."""

    def __init__(self) -> None:
        self.outcome = Outcome.RUNNING
        self.reason = ""

    @property
    def asked(self) -> bool:
        """Whether the run is to end early."""
        return self.outcome is not Outcome.RUNNING

    def ask(self, outcome: Outcome, reason: str) -> None:
        """End the run after the current step. The first to ask decides the outcome."""
        if not self.asked:
            self.outcome, self.reason = outcome, reason
