"""What recovery did in a run, counted."""

from typing import Any


class RecoveryLog:
    """Counts what recovery did in this run."""

    def __init__(self) -> None:
        self.attempt = 0
        self.rollbacks = 0
        self.skipped_batches = 0
        self.skipped_updates = 0
        self.rate_cut = 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the counters."""
        vars(self).update(state_dict)
