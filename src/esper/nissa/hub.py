"""The telemetry hub: takes records from the loop and carries them to the sinks beside it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from esper.leyline import Event, Level, Record, Sink, StepRecord

_DRAIN_INTERVAL_S = 0.2


class TelemetryHub:
    """Hands records to sinks on a thread of its own; a sink can fail or hang without consequence.

    :param sinks: each receives every record, in order. One that has a ``flush()`` is flushed when
        a batch of records has been written.
    :param capacity: records that may wait; beyond it step records are dropped and counted, while
        epochs and events never are.
    :param max_failures: failures in a row after which a sink is disabled.
    """

    def __init__(
        self, sinks: Sequence[Sink], *, capacity: int = 65536, max_failures: int = 3
    ) -> None:
        self.dropped = 0
        self._outlets = [_Outlet(sink, max_failures) for sink in sinks]
        self._capacity = capacity
        self._waiting: deque[Record] = deque()
        self._emitted = self._delivered = 0
        self._closing = False
        self._wake = threading.Event()
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="esper-telemetry", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> dict[str, int]:
        """How often each sink failed, by its class name."""
        return {outlet.name: outlet.failures for outlet in self._outlets}

    def emit(self, record: Record) -> None:
        """Take one record. Never blocks and never raises."""
        if len(self._waiting) >= self._capacity and isinstance(record, StepRecord):
            self.dropped += 1
            return
        self._waiting.append(record)
        self._emitted += 1

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything emitted so far has reached the sinks.

        :returns: whether it has, within ``timeout_s`` seconds.
        """
        target = self._emitted
        self._wake.set()
        with self._progress:
            return self._progress.wait_for(lambda: self._delivered >= target, timeout_s)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Deliver what is waiting, close the sinks and end the thread.

        :returns: False when a sink still hangs after ``timeout_s`` seconds; it is left behind.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> "TelemetryHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while not self._closing:
            self._wake.wait(_DRAIN_INTERVAL_S)
            self._wake.clear()
            self._drain()
        self._drain()
        self._drain()  # what the sinks complained of in the round before
        for outlet in self._outlets:
            outlet.close()

    def _drain(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batch:
            return
        for outlet in self._outlets:
            outlet.deliver(batch)
            for event in outlet.take_complaints():
                self.emit(event)
        with self._progress:
            self._delivered += len(batch)
            self._progress.notify_all()


class NullHub:
    """Takes records and forgets them."""

    dropped = 0

    def emit(self, record: Record) -> None:
        """Do nothing."""

    def flush(self, timeout_s: float = 5.0) -> bool:  # noqa: ARG002 - TelemetryHub's signature
        """Do nothing."""
        return True

    def close(self, timeout_s: float = 5.0) -> bool:  # noqa: ARG002 - TelemetryHub's signature
        """Do nothing."""
        return True


class _Outlet:
    """One sink, with its failures counted and contained."""

    def __init__(self, sink: Sink, max_failures: int) -> None:
        self.name = type(sink).__name__
        self.failures = 0
        self._complaints: list[Event] = []
        self._sink = sink
        self._in_a_row = 0
        self._max_failures = max_failures
        self._enabled = True

    def deliver(self, batch: list[Record]) -> None:
        for record in batch:
            if not self._enabled:
                return
            self._attempt(self._sink.write, record)
        flush = getattr(self._sink, "flush", None)
        if flush is not None and self._enabled:
            self._attempt(flush)

    def close(self) -> None:
        self._attempt(self._sink.close)

    def take_complaints(self) -> list[Event]:
        """Return what the other sinks should be told about this one."""
        complaints, self._complaints = self._complaints, []
        return complaints

    def _attempt(self, action: Callable[..., object], *arguments: Record) -> None:
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001 - a sink may fail in any way; it is counted
            self.failures += 1
            self._in_a_row += 1
            self._complain(f"{type(error).__name__}: {error}")
        else:
            self._in_a_row = 0

    def _complain(self, error: str) -> None:
        if self._in_a_row >= self._max_failures and self._enabled:
            self._enabled = False
            name, what = "sink_disabled", f"failed {self._in_a_row} times in a row and is disabled"
        elif self._in_a_row == 1:
            name, what = "sink_failed", "failed"
        else:
            return
        self._complaints.append(
            Event(
                name=name,
                time=time.time(),
                message=f"{self.name} {what}: {error}",
                level=Level.WARNING,
                data={"sink": self.name, "error": error, "failures": self.failures},
            )
        )
