"""The one way out of the loop: calls to companions and services, under deadline and breaker."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from esper.core.breaker import BreakerState, CircuitBreaker, Permit
from esper.core.config import BreakerConfig
from esper.core.latency import LatencyHistogram
from esper.core.worker import AsyncWorker, Isolation, Outcome, WorkerHandle
from esper.leyline import CallCancelled, DeadlineExceeded, Level, WorkerClosed, WorkerFull

Reply = TypeVar("Reply")

# Missed deadlines in a row that are trouble, before the breaker opens.
_REPEATED = 2
_COUNTED = {
    Outcome.OK: "success",
    Outcome.TIMEOUT: "timeout",
    Outcome.ABANDONED: "timeout",
    Outcome.CANCELLED: "cancelled",
    Outcome.ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Answer(Generic[Reply]):
    """The end of one call.

    :param outcome: how it ended.
    :param reply: what the function returned, when it was in time.
    :param detail: why there is no reply; empty when there is one.
    :param latency_ms: milliseconds from the question to this answer; None when it was not asked.
    """

    outcome: Outcome
    reply: Reply | None = None
    detail: str = ""
    latency_ms: float | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a reply."""
        return self.outcome is Outcome.OK


class Trouble(Protocol):
    """Who is told when something outside keeps failing."""

    def __call__(self, reason: str) -> None:
        """Take a reason, the same words for the same trouble."""
        ...


Announce = Callable[[str, str, Level, dict[str, Any]], None]


@dataclass(frozen=True)
class Surroundings:
    """What every dependency of one run shares.

    :param worker: carries out the calls.
    :param breaker: when something that fails is left alone.
    :param announce: takes events: name, message, level, data.
    :param trouble: told of repeated timeouts and of an opened breaker.
    """

    worker: AsyncWorker
    breaker: BreakerConfig
    announce: Announce
    trouble: Trouble


class Dependency:
    """Something outside of the loop that is asked one thing at a time.

    Whatever goes wrong out there is counted, told and contained: nothing that is asked through this
    raises, blocks beyond its deadline, or has an effect after it.

    :param name: for metrics, events and messages: ``tamiyo``, ``kasmina``, ``rollback``, ...
    :param timeout_s: seconds that each call has.
    :param surroundings: worker, breaker settings, and who is told.
    """

    def __init__(self, name: str, timeout_s: float, surroundings: Surroundings) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.counts: Counter[str] = Counter()
        self.latency = LatencyHistogram()
        config = surroundings.breaker
        self.breaker = CircuitBreaker(
            name,
            failures=config.failures,
            cooldown_s=config.cooldown_s,
            max_cooldown_s=config.max_cooldown_s,
            on_change=self._tell_breaker,
        )
        self._worker = surroundings.worker
        self._announce = surroundings.announce
        self._trouble = surroundings.trouble
        self._handle: WorkerHandle[Any] | None = None
        self._permit: Permit | None = None
        self._unfinished: WorkerHandle[Any] | None = None
        self._timeouts_in_a_row = 0

    @property
    def pending(self) -> bool:
        """Whether an answer is still expected."""
        return self._handle is not None

    @property
    def idle(self) -> bool:
        """Whether no answer is expected, and no function of an earlier call still runs."""
        return self._handle is None and not self._still_runs()

    @property
    def closed(self) -> bool:
        """Whether the worker takes no calls any more, as at the end of the program."""
        return self._worker.closed

    @property
    def crowded(self) -> bool:
        """Whether all slots of the worker are taken."""
        return len(self._worker.stats().live) >= self._worker.max_concurrency

    def why_not(self) -> str:
        """Return why nothing can be asked at present, as far as this can tell."""
        if reason := self.held_open():
            return reason
        return "it still works on an earlier call" if self._still_runs() else "all slots are taken"

    def submit_async(
        self,
        function: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        isolation: Isolation | None = None,
    ) -> bool:
        """Ask, and return at once; :meth:`poll` has the answer.

        :param isolation: where the function runs; see :meth:`AsyncWorker.submit`.
        :returns: False when nothing was asked: the breaker is open, the worker is full, or the
            function of an earlier call still runs.
        :raises RuntimeError: an answer is still expected.
        """
        if self._handle is not None:
            raise RuntimeError(f"{self.name} is asked something while an answer is expected")
        permit = self.breaker.admit()
        if permit is None:
            self.counts["refused"] += 1
            return False
        if self._still_runs():
            self._note_timeout(permit, "still works on an earlier call")
            return False
        try:
            self._handle = self._worker.submit(
                function,
                *arguments,
                timeout_s=self.timeout_s,
                name=f"tolaria.{self.name}",
                isolation=isolation,
            )
        except (WorkerFull, WorkerClosed) as error:
            # It says nothing about what would have been called.
            self.breaker.release(permit)
            self.counts["refused"] += 1
            self._announce(f"{self.name}_refused", str(error), Level.WARNING, {})
            return False
        except TypeError as error:
            self._note_error(permit, f"cannot be called: {error}")
            return False
        self._permit = permit
        return True

    def call_here(self, function: Callable[..., Any], *arguments: Any) -> Answer[Any]:  # noqa: ANN401
        """Carry something out on the calling thread, because it changes what only that may change.

        What it raises is contained and counted; nothing can stop it.
        """
        permit, began = self.breaker.admit(), time.monotonic()
        if permit is None:
            self.counts["refused"] += 1
            return Answer(Outcome.REFUSED, detail=self.held_open())
        reply, detail, outcome = None, "", Outcome.OK
        try:
            reply = function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a companion raises is contained here
            detail, outcome = f"{type(error).__name__}: {error}", Outcome.ERROR
        seconds = time.monotonic() - began
        self.latency.add(seconds)
        self._count(outcome, permit, detail)
        return Answer(outcome, reply, detail, seconds * 1e3)

    def poll(self) -> Answer[Any] | None:
        """Return the answer once, as soon as there is one or its deadline has passed."""
        handle = self._handle
        if handle is None or not handle.done():
            return None
        return self._take(handle)

    def wait(self) -> Answer[Any] | None:
        """Block until there is an answer, at most until the deadline and the worker's grace."""
        handle = self._handle
        return None if handle is None else self._take(handle)

    def cancel(self) -> None:
        """Expect no answer any more."""
        handle, permit = self._handle, self._permit
        if handle is None or permit is None:
            return
        handle.cancel()
        self.breaker.release(permit)
        self.counts["cancelled"] += 1
        self._unfinished, self._handle, self._permit = handle, None, None

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the calls by name; what was not measured is absent."""
        family = f"tolaria.timeout.{self.name}"
        metrics = {
            f"{family}.{outcome}": float(self.counts[outcome])
            for outcome in ("success", "timeout", "cancelled", "error", "refused")
        }
        metrics[f"{family}.breaker_open"] = float(self.breaker.state is not BreakerState.CLOSED)
        p95 = self.latency.quantile(0.95)
        if self.latency.last_s is not None and p95 is not None:
            metrics[f"{family}.last_ms"] = self.latency.last_s * 1e3
            metrics[f"{family}.p95_ms"] = p95 * 1e3
        return metrics

    def held_open(self) -> str:
        """Return what keeps the engine careful; empty when nothing does."""
        state = self.breaker.state
        return "" if state is BreakerState.CLOSED else f"the breaker of {self.name} is {state}"

    def _still_runs(self) -> bool:
        if self._unfinished is not None and self._unfinished.ended:
            self._unfinished = None
        return self._unfinished is not None

    def _take(self, handle: WorkerHandle[Any]) -> Answer[Any]:
        permit = self._permit
        if permit is None:
            raise RuntimeError(f"the call of {self.name} has lost its permit")
        reply, detail = None, ""
        try:
            reply = handle.result()
        except (DeadlineExceeded, CallCancelled) as error:
            detail = str(error)
        except Exception as error:  # noqa: BLE001 - whatever is raised out there is contained here
            detail = f"{type(error).__name__}: {error}"
        outcome, latency_s = handle.outcome or Outcome.ERROR, handle.latency_s or 0.0
        self._unfinished, self._handle, self._permit = handle, None, None
        self.latency.add(latency_s)
        self._count(outcome, permit, detail)
        return Answer(outcome, reply, detail, latency_s * 1e3)

    def _count(self, outcome: Outcome, permit: Permit, detail: str) -> None:
        if outcome is Outcome.OK:
            self.counts["success"] += 1
            self._timeouts_in_a_row = 0
            self.breaker.settle(permit, ok=True)
        elif outcome is Outcome.ERROR:
            self._note_error(permit, detail)
        elif outcome is Outcome.CANCELLED:
            self.counts["cancelled"] += 1
            self.breaker.release(permit)
        else:
            self._note_timeout(permit, detail)

    def _note_timeout(self, permit: Permit, detail: str) -> None:
        self.counts["timeout"] += 1
        self._timeouts_in_a_row += 1
        message = f"{self.name}: {detail}"
        data = {"timeout_ms": self.timeout_s * 1e3, "total": self.counts["timeout"]}
        self._announce(f"{self.name}_timeout", message, Level.WARNING, data)
        if self._timeouts_in_a_row == _REPEATED:
            self._trouble(f"{self.name} missed its deadline {_REPEATED} times in a row")
        self.breaker.settle(permit, ok=False, error=detail)

    def _note_error(self, permit: Permit, detail: str) -> None:
        self.counts["error"] += 1
        self._timeouts_in_a_row = 0
        data = {"error": detail, "total": self.counts["error"]}
        message = f"{self.name} failed: {detail}"
        self._announce(f"{self.name}_error", message, Level.WARNING, data)
        self.breaker.settle(permit, ok=False, error=detail)

    def _tell_breaker(
        self, breaker: CircuitBreaker, before: BreakerState, after: BreakerState
    ) -> None:
        data = {"dependency": self.name, "before": before.value, "after": after.value}
        if after is BreakerState.OPEN:
            message = (
                f"{self.name} is left alone for {breaker.retry_in_s:.3g} s after "
                f"{breaker.failures_in_a_row} failures in a row: {breaker.last_error}"
            )
            self._announce("breaker_opened", message, Level.WARNING, data)
            self._trouble(f"the breaker of {self.name} opened")
        elif after is BreakerState.CLOSED:
            self._announce("breaker_closed", f"{self.name} answers again", Level.INFO, data)
