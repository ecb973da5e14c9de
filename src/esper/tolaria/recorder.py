"""From what happened in a step to what is told about it."""

import time
from typing import Any, Protocol

from esper.leyline import Event, Level, Record, StepRecord, Verdict
from esper.tolaria.data import Batch
from esper.tolaria.epoch_meter import EpochMeter
from esper.tolaria.objective import Gradients
from esper.tolaria.recovery_log import RecoveryLog
from esper.tolaria.update import Update

PHASES = ("keep", "data", "forward", "backward", "judge", "commit")


class Outlet(Protocol):
    """Where records go; the telemetry hub is one."""

    def emit(self, record: Record) -> None:
        """Take one record without blocking."""
        ...


class Recorder:
    """Makes step records and events, hands them to the outlet, and keeps the epoch's means.

    :param outlet: receives every record.
    :param update: tells step and learning rate.
    :param log: tells the attempt.
    """

    def __init__(self, outlet: Outlet, update: Update, log: RecoveryLog) -> None:
        self.meter = EpochMeter()
        self.outlet = outlet
        self.update = update
        self._log = log
        self._validated: tuple[int, dict[str, float]] = -1, {}

    @property
    def attempt(self) -> int:
        """Counts rollbacks and resumes."""
        return self._log.attempt

    def record(
        self,
        step: int,
        batch: Batch,
        gradients: Gradients,
        verdict: Verdict,
        clock: list[int],
    ) -> StepRecord:
        """Make, keep and emit the record of one step.

        :param step: index of the step.
        :param clock: ``time.perf_counter_ns`` at the end of the step before and of each phase.
        """
        report = gradients.report
        timings = {
            phase: (clock[index + 1] - clock[index]) / 1e6 for index, phase in enumerate(PHASES)
        }
        record = StepRecord(
            step=step,
            attempt=self._log.attempt,
            epoch=batch.epoch,
            batch=batch.number,
            time=time.time(),
            action=verdict.action.value,
            loss=gradients.total,
            losses=gradients.losses,
            learning_rate=self.update.learning_rate,
            gradient_norm=gradients.norm,
            conflicts=None if report is None else report.conflicts,
            conflict_rate=None if report is None else report.conflict_rate,
            cosines={} if report is None else report.cosines(),
            timings_ms=timings,
            suspicious=verdict.suspicious,
            reason=verdict.reason,
        )
        self.meter.add(record, len(batch.samples))
        self.outlet.emit(record)
        return record

    def note_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Remember what was measured on the validation data after so many steps."""
        self._validated = step, metrics

    def validation_at(self, step: int) -> dict[str, float]:
        """Return the validation metrics of the state after so many steps; empty without any."""
        validated, metrics = self._validated
        return metrics if validated == step else {}

    def event(
        self,
        name: str,
        message: str,
        level: Level = Level.INFO,
        **data: Any,  # noqa: ANN401 - JSON
    ) -> None:
        """Emit one event, stamped with time, step and attempt."""
        self.announce(name, message, level, data)

    def announce(self, name: str, message: str, level: Level, data: dict[str, Any]) -> None:
        """Emit one event whose values come as a mapping."""
        self.outlet.emit(
            Event(
                name=name,
                time=time.time(),
                message=message,
                step=self.update.progress.step,
                attempt=self._log.attempt,
                level=level,
                data=data,
            )
        )
