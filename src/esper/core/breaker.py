"""A circuit breaker: stops calling a companion that keeps failing, and tries again later."""

import math
import threading
import time
from collections.abc import Callable
from enum import StrEnum


class BreakerState(StrEnum):
    """Whether calls are let through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Permit:
    """Leave to make one call; to be settled or released when the call has ended.

    :param breaker: the one that gave it.
    :param era: counts how often that breaker had opened or closed by then.
    :param probe: whether the call decides if the breaker closes again.
    """

    __slots__ = ("breaker", "era", "probe", "spent")

    def __init__(self, breaker: "CircuitBreaker", era: int, probe: bool) -> None:
        self.breaker = breaker
        self.era = era
        self.probe = probe
        self.spent = False


OnChange = Callable[["CircuitBreaker", BreakerState, BreakerState], None]


class CircuitBreaker:
    """Refuses calls after several failures in a row, then lets one probe through at a time.

    A probe that succeeds closes the breaker; one that fails opens it for twice as long as before.
    Every permit has to be settled or released: a probe that is neither keeps all others out. Any
    thread may call any method.

    :param name: of what is called; for messages.
    :param failures: failures in a row that open the breaker.
    :param cooldown_s: seconds from opening to the first probe.
    :param max_cooldown_s: the most that repeated failures of the probe stretch them to.
    :param clock: seconds that never run backwards.
    :param on_change: called with the breaker and its states before and after, once per transition,
        by the thread that caused it and outside the lock. The transition to half-open is that of
        the call to :meth:`admit` that gives out the first probe. What it raises goes to that
        thread; the transition stands, a probe just given out is released.
    :raises ValueError: a parameter is out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = 3,
        cooldown_s: float = 30.0,
        max_cooldown_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: OnChange | None = None,
    ) -> None:
        _check(name, failures, cooldown_s, max_cooldown_s)
        self.name = name
        self._limit = failures
        self._base_s = self._cooldown_s = cooldown_s
        self._max_cooldown_s = max_cooldown_s
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._era = 0
        self._probe: Permit | None = None
        self._probe_at = -math.inf
        self._failures = self._opened = 0
        self._last_error = ""

    def admit(self) -> Permit | None:
        """Return leave to make one call, or None while calls are refused."""
        with self._lock:
            before = self._state
            closed = before is BreakerState.CLOSED
            if not closed and (self._probe is not None or self._clock() < self._probe_at):
                return None
            permit = Permit(self, self._era, probe=not closed)
            if not closed:
                self._state = BreakerState.HALF_OPEN
                self._probe = permit
            after = self._state
        try:
            self._tell(before, after)
        except BaseException:
            self.release(permit)
            raise
        return permit

    def settle(self, permit: Permit, ok: bool, error: str = "") -> None:
        """Count how a call ended.

        Nothing is counted when the permit was settled or released before, or when the breaker has
        opened or closed since it was given out.

        :param permit: from :meth:`admit`.
        :param ok: whether the call succeeded.
        :param error: what went wrong, when it did not.
        :raises ValueError: the permit is another breaker's.
        """
        with self._lock:
            before = self._state
            if self._spend(permit):
                if ok:
                    self._succeed()
                else:
                    self._fail(error)
            after = self._state
        self._tell(before, after)

    def release(self, permit: Permit) -> None:
        """Give a permit back whose call told nothing: cancelled, or refused before it was made.

        It counts neither as success nor as failure. If it was the probe, another may pass.

        :raises ValueError: the permit is another breaker's.
        """
        with self._lock:
            self._spend(permit)

    @property
    def state(self) -> BreakerState:
        """Half-open from the moment a probe may pass until one has ended; open before that."""
        with self._lock:
            if self._state is BreakerState.OPEN and self._clock() >= self._probe_at:
                return BreakerState.HALF_OPEN
            return self._state

    @property
    def retry_in_s(self) -> float:
        """Seconds until a probe may pass; 0 unless the breaker is open."""
        with self._lock:
            if self._state is not BreakerState.OPEN:
                return 0.0
            return max(0.0, self._probe_at - self._clock())

    @property
    def failures_in_a_row(self) -> int:
        """Failures counted since the last success."""
        return self._failures

    @property
    def opened_total(self) -> int:
        """How often the breaker has opened, failed probes included."""
        return self._opened

    @property
    def last_error(self) -> str:
        """What was said of the last failure counted; empty before the first."""
        return self._last_error

    def _spend(self, permit: Permit) -> bool:
        """Use up a permit; return whether what came of its call still counts."""
        if permit.breaker is not self:
            raise ValueError(
                f"breaker {self.name!r}: the permit was given out by breaker "
                f"{permit.breaker.name!r}; settle or release it there"
            )
        counts = not permit.spent and permit.era == self._era
        permit.spent = True
        if permit is self._probe:
            self._probe = None
        return counts

    def _succeed(self) -> None:
        self._failures = 0
        if self._state is BreakerState.HALF_OPEN:
            self._state = BreakerState.CLOSED
            self._era += 1
            self._cooldown_s = self._base_s

    def _fail(self, error: str) -> None:
        self._failures += 1
        self._last_error = error
        if self._state is BreakerState.HALF_OPEN:
            self._cooldown_s = min(2 * self._cooldown_s, self._max_cooldown_s)
        elif self._failures < self._limit:
            return
        self._state = BreakerState.OPEN
        self._era += 1
        self._opened += 1
        self._probe_at = self._clock() + self._cooldown_s

    def _tell(self, before: BreakerState, after: BreakerState) -> None:
        if before is not after and self._on_change is not None:
            self._on_change(self, before, after)


def _check(name: str, failures: int, cooldown_s: float, max_cooldown_s: float) -> None:
    if failures < 1:
        raise ValueError(f"breaker {name!r}: failures is {failures}; give at least 1")
    if not 0 < cooldown_s < math.inf:
        raise ValueError(f"breaker {name!r}: cooldown_s is {cooldown_s}; give seconds above 0")
    if not cooldown_s <= max_cooldown_s < math.inf:
        raise ValueError(
            f"breaker {name!r}: max_cooldown_s is {max_cooldown_s}; give at least "
            f"cooldown_s, which is {cooldown_s:g}"
        )
