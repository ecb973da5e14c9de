"""Telling others of an emergency, beside training, until they have been told."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from esper.leyline import EmergencySignal, Level

_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 30.0

Publish = Callable[[EmergencySignal], Any]
Announce = Callable[[str, str, Level, dict[str, Any]], None]


class Reply(Protocol):
    """What came of one attempt."""

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        ...

    @property
    def detail(self) -> str:
        """Why it did not."""
        ...

    @property
    def latency_ms(self) -> float | None:
        """How long it took."""
        ...


class Caller(Protocol):
    """Carries out one call at a time beside the caller."""

    def submit_async(self, function: Callable[..., Any], *arguments: Any) -> bool:  # noqa: ANN401
        """Ask; False when it cannot be asked just now."""
        ...

    def poll(self) -> Reply | None:
        """Return the answer once."""
        ...


class Broadcasts:
    """Signals that have to be published, in order; each stays until it has been.

    :param caller: carries the attempts out.
    :param publish: tells whoever has to know; None when there is nobody.
    :param announce: told of attempts that failed.
    :param clock: seconds that never run backwards.
    """

    def __init__(
        self,
        caller: Caller,
        publish: Publish | None,
        announce: Announce,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent = self.failed = 0
        self.last_latency_ms: float | None = None
        self._caller = caller
        self._publish = publish
        self._announce = announce
        self._clock = clock
        self._waiting: deque[EmergencySignal] = deque()
        self._under_way: EmergencySignal | None = None
        self._backoff_s = _FIRST_BACKOFF_S
        self._not_before = -float("inf")

    @property
    def pending(self) -> int:
        """Signals that have not been published."""
        return len(self._waiting)

    def send(self, signal: EmergencySignal) -> None:
        """Take a signal, unless the same level and reason wait already."""
        if self._publish is None:
            return
        same = (signal.level, signal.reason)
        if any((waiting.level, waiting.reason) == same for waiting in self._waiting):
            return
        self._waiting.append(signal)
        # What is new does not wait for the next attempt at what is old.
        self._not_before = -float("inf")

    def pump(self) -> None:
        """Take what came of the last attempt, and begin the next when it is time."""
        if not self._waiting or self._publish is None:
            return
        if self._under_way is not None:
            reply = self._caller.poll()
            if reply is None:
                return
            self._take(self._under_way, reply)
        if self._waiting and self._clock() >= self._not_before:
            signal = self._waiting[0]
            if self._caller.submit_async(self._publish, signal):
                self._under_way = signal
            else:
                self._fail(signal, "it cannot be sent at present")

    def state_dict(self) -> dict[str, Any]:
        """Return what waits, and the counters."""
        return {
            "waiting": [msgspec.to_builtins(signal) for signal in self._waiting],
            "sent": self.sent,
            "failed": self.failed,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take over what waited; what waits here already stays."""
        known = {signal.id for signal in self._waiting}
        saved = [msgspec.convert(entry, EmergencySignal) for entry in state_dict["waiting"]]
        self._waiting.extendleft(s for s in reversed(saved) if s.id not in known)
        self.sent, self.failed = state_dict["sent"], state_dict["failed"]

    def _take(self, signal: EmergencySignal, reply: Reply) -> None:
        self._under_way = None
        if reply.ok:
            self._waiting.remove(signal)
            self.sent += 1
            self.last_latency_ms = reply.latency_ms
            self._backoff_s = _FIRST_BACKOFF_S
        else:
            self._fail(signal, reply.detail)

    def _fail(self, signal: EmergencySignal, detail: str) -> None:
        self.failed += 1
        self._not_before = self._clock() + self._backoff_s
        message = (
            f"emergency {signal.level.name.lower()} ({signal.reason}) could not be told: {detail}; "
            f"tried again in {self._backoff_s:g} s"
        )
        data = {"signal": msgspec.to_builtins(signal), "error": detail, "failures": self.failed}
        self._announce("emergency_broadcast_failed", message, Level.CRITICAL, data)
        self._backoff_s = min(2 * self._backoff_s, _LONGEST_BACKOFF_S)
