"""Means over the committed steps of one epoch."""

from typing import Any

from esper.leyline import Action, StepRecord

_Sum = list[float]


class EpochMeter:
    """Adds up step records; a rollback restores it together with the rest of the state."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._skipped = 0
        self._samples = 0

    def add(self, record: StepRecord, samples: int) -> None:
        """Take in one step.

        :param samples: samples in its batch.
        """
        if record.action != Action.COMMIT:
            self._skipped += record.action == Action.SKIP
            return
        self._samples += samples
        sums = self._sums
        values = {f"loss/{task}": loss for task, loss in record.losses.items()}
        if record.gradient_norm is not None:
            values["gradient_norm"] = record.gradient_norm
        if record.conflicts is not None and record.conflict_rate is not None:
            pairs = len(record.cosines)
            values["conflict_rate"] = record.conflict_rate
            values["conflict_share"] = record.conflicts / pairs if pairs else 0.0
        for phase, milliseconds in record.timings_ms.items():
            values[f"timing/{phase}"] = milliseconds
        for name, value in values.items():
            entry = sums.get(name)
            if entry is None:
                sums[name] = [value, 1]
            else:
                entry[0] += value
                entry[1] += 1

    def means(self, group: str) -> dict[str, float]:
        """Return the means of a group, ``"loss"`` or ``"timing"``, by name."""
        prefix = f"{group}/"
        return {
            name.removeprefix(prefix): total / count
            for name, (total, count) in self._sums.items()
            if name.startswith(prefix)
        }

    def mean(self, name: str) -> float | None:
        """Return one mean, or None when nothing was measured."""
        if name not in self._sums:
            return None
        total, count = self._sums[name]
        return total / count

    @property
    def skipped(self) -> int:
        """Updates that were refused."""
        return self._skipped

    @property
    def samples(self) -> int:
        """Samples in the committed steps."""
        return self._samples

    def reset(self) -> None:
        """Begin the next epoch."""
        self._sums.clear()
        self._skipped = self._samples = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        sums = {name: list(entry) for name, entry in self._sums.items()}
        return {"sums": sums, "skipped": self._skipped, "samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the sums."""
        self._sums = {name: list(entry) for name, entry in state_dict["sums"].items()}
        self._skipped = state_dict["skipped"]
        self._samples = state_dict["samples"]
