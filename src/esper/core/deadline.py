"""Absolute deadlines on the monotonic clock."""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment by which something has to be done; waiting in a queue counts.

    :param at: seconds on ``time.monotonic``.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the deadline that lies ``seconds`` from the present."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether the moment has gone by."""
        return time.monotonic() >= self.at
