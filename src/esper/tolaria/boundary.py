"""How long training stands still between two epochs, and what is measured there."""

from collections.abc import Sequence
from typing import Protocol

from esper.core.latency import LatencyHistogram
from esper.leyline import Level, SystemState
from esper.tolaria.emergency import EmergencyController
from esper.tolaria.recorder import Recorder


class Measured(Protocol):
    """Something that has metrics of its own."""

    def metrics(self) -> dict[str, float]:
        """Return the newest values by name; what was not measured is absent."""
        ...


class Boundary:
    """Holds the time of each epoch boundary against its budget.

    A boundary over budget raises an alarm. It is slow, not broken: nothing is rolled back for it.

    :param budget_ms: milliseconds that a boundary may take, validation aside.
    :param recorder: told of alarms.
    :param sources: what else is measured when an epoch ends.
    :param emergency: ended by a healthy epoch.
    """

    def __init__(
        self,
        budget_ms: float,
        recorder: Recorder,
        sources: Sequence[Measured],
        emergency: EmergencyController,
    ) -> None:
        self.exceeded = 0
        self._budget_ms = budget_ms
        self._recorder = recorder
        self._sources = sources
        self._emergency = emergency
        self._rollbacks = 0
        self._latency = LatencyHistogram()

    def close(self, state: SystemState, seconds: float) -> None:
        """Take in how long one boundary took; an epoch without trouble ends an emergency."""
        healthy = state.skipped == 0 and state.rollbacks == self._rollbacks
        self._rollbacks = state.rollbacks
        self._emergency.close_epoch(healthy)
        self._measure(state.epoch, seconds)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the boundaries and of all sources."""
        metrics = {"tolaria.epoch.budget_exceeded_total": float(self.exceeded)}
        p95 = self._latency.quantile(0.95)
        if self._latency.last_s is not None and p95 is not None:
            metrics["tolaria.epoch.boundary_ms"] = self._latency.last_s * 1e3
            metrics["tolaria.epoch.boundary_p95_ms"] = p95 * 1e3
        for source in self._sources:
            metrics.update(source.metrics())
        return metrics

    def _measure(self, epoch: int, seconds: float) -> None:
        self._latency.add(seconds)
        milliseconds = seconds * 1e3
        if milliseconds <= self._budget_ms:
            return
        self.exceeded += 1
        self._recorder.event(
            "epoch_budget_exceeded",
            f"the end of epoch {epoch + 1} took {milliseconds:.3g} ms; {self._budget_ms:g} ms are "
            "planned (telemetry.epoch_boundary_ms)",
            Level.WARNING,
            epoch=epoch,
            latency_ms=milliseconds,
            budget_ms=self._budget_ms,
        )
