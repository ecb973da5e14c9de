"""One call: its deadline, its way to the end, and what the caller sees of it."""

import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from enum import StrEnum
from typing import Any, Generic, TypeVar

from esper.leyline import CallCancelled, DeadlineExceeded

Reply = TypeVar("Reply")


class Isolation(StrEnum):
    """Where a function runs, which is what decides how it can be stopped."""

    ASYNC = "async"
    THREAD = "thread"
    PROCESS = "process"


class Outcome(StrEnum):
    """How a submission ended; each ends in exactly one of these."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    REFUSED = "refused"


class Call:
    """What worker and caller share about one submission.

    It is *settled* once the caller is told an outcome, and it has *ended* once the function no
    longer runs. An abandoned call is settled before it has ended.

    :param name: under which it is counted.
    :param isolation: where the function runs.
    :param timeout_s: seconds from now until the deadline.
    :param grace_s: seconds past the deadline for the function to end, before it is abandoned.
    :param parent: the call from inside which this one was submitted; the deadline is not later.
    """

    __slots__ = (
        "_callbacks",
        "_gate",
        "_lock",
        "_on_cancel",
        "cancel_asked",
        "deadline",
        "ended",
        "give_up_at",
        "handle",
        "isolation",
        "name",
        "outcome",
        "parent",
        "settled_at",
        "submitted",
    )

    def __init__(
        self,
        name: str,
        isolation: Isolation,
        timeout_s: float,
        grace_s: float,
        parent: "Call | None",
    ) -> None:
        self.name = name
        self.isolation = isolation
        self.submitted = time.monotonic()
        self.deadline: float = self.submitted + timeout_s
        if parent is not None:
            self.deadline = min(self.deadline, parent.deadline)
        self.give_up_at = self.deadline + grace_s
        self.parent = parent
        self.settled_at = 0.0
        self.outcome: Outcome | None = None
        self.ended = False
        self.cancel_asked = False
        self._lock = threading.Lock()
        # Held until the call is settled: a lock is the cheapest thing that one can wait for.
        self._gate = threading.Lock()
        self._gate.acquire()
        self._on_cancel: Callable[[], None] | None = None
        # The result is kept by who may ask for it, and by nobody else: a cancelled timer keeps its
        # context, and thereby the call, for as long as it would have run.
        self.handle: Callable[[], WorkerHandle[Any] | None] = _no_handle
        self._callbacks: list[Callable[[], None]] = []

    @property
    def should_stop(self) -> bool:
        """Whether it was cancelled or its deadline has passed."""
        return self.cancel_asked or time.monotonic() >= self.deadline

    def judge(self, error: BaseException | None) -> Outcome:
        """Return the outcome of a function that has ended just now."""
        if isinstance(error, asyncio.CancelledError) and self.cancel_asked:
            return Outcome.CANCELLED
        if time.monotonic() >= self.deadline:
            return Outcome.TIMEOUT
        if isinstance(error, asyncio.CancelledError):
            return Outcome.CANCELLED
        return Outcome.OK if error is None else Outcome.ERROR

    def settle(
        self, outcome: Outcome, value: object = None, error: BaseException | None = None
    ) -> bool:
        """Fix the outcome, to be announced then; False when it has been fixed before."""
        with self._lock:
            if self.outcome is not None:
                return False
            handle = self.handle()
            if handle is not None:
                handle.keep(value if outcome is Outcome.OK else None, error)
            self.settled_at = time.monotonic()
            self.outcome = outcome
            if outcome is not Outcome.ABANDONED:
                self._on_cancel = None
        return True

    def announce(self) -> None:
        """Wake whoever waits; for the one who settled it, once."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        self._gate.release()
        for callback in callbacks:
            callback()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is settled; False when it is not after ``timeout_s`` seconds."""
        if self.outcome is not None:
            return True
        if not self._gate.acquire(timeout=max(0.0, timeout_s)):
            return False
        self._gate.release()
        return True

    def ask_to_cancel(self) -> None:
        """Ask the function to stop, by the means of its lane."""
        with self._lock:
            self.cancel_asked = True
            stop, self._on_cancel = self._on_cancel, None
        if stop is not None:
            stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Say how the running function is stopped; done at once if it was asked for already."""
        with self._lock:
            if not self.cancel_asked:
                self._on_cancel = stop
                return
        stop()

    def off_cancel(self) -> bool:
        """Take back how the function is stopped; False when that has been asked for already."""
        with self._lock:
            self._on_cancel = None
            return not self.cancel_asked

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call back when the outcome is fixed, at once if it is."""
        with self._lock:
            if self.outcome is None:
                self._callbacks.append(callback)
                return
        callback()


current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "esper_current_call", default=None
)


def check_cancelled() -> None:
    """Raise if the call that this code runs in should stop. Outside of a call, do nothing.

    Call it now and then in a function submitted with ``isolation="thread"``: that is what makes
    its deadline hold.

    :raises asyncio.CancelledError: the call was cancelled, or its deadline has passed.
    """
    call = current_call.get()
    if call is not None and call.should_stop:
        raise asyncio.CancelledError(f"{call.name} is to stop")


class WorkerHandle(Generic[Reply]):
    """One submission, as its submitter sees it. It can be polled, waited for, or awaited."""

    __slots__ = ("__weakref__", "_abandon", "_call", "_error", "_value", "_would_block")

    def __init__(
        self, call: Call, abandon: Callable[[Call], None], would_block: Callable[[], bool]
    ) -> None:
        self._call = call
        self._abandon = abandon
        self._would_block = would_block
        self._value: Any = None
        self._error: BaseException | None = None
        call.handle = weakref.ref(self)

    def __repr__(self) -> str:
        state = self._call.outcome or "running"
        return f"<WorkerHandle {self._call.name} {self._call.isolation} {state}>"

    @property
    def name(self) -> str:
        """Under which the call is counted."""
        return self._call.name

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while it is under way."""
        return self._call.outcome if self.done() else None

    @property
    def ended(self) -> bool:
        """Whether the function no longer runs; an abandoned one still does."""
        return self._call.ended

    @property
    def latency_s(self) -> float | None:
        """Seconds from submission to outcome; None while it is under way."""
        return self._call.settled_at - self._call.submitted if self.done() else None

    def keep(self, value: object, error: BaseException | None) -> None:
        """Take what the function returned or raised; for the call to give."""
        self._value, self._error = value, error

    def done(self) -> bool:
        """Whether the outcome is fixed; it is once deadline and grace have passed."""
        call = self._call
        if call.outcome is not None:
            return True
        if time.monotonic() < call.give_up_at:
            return False
        self._abandon(call)
        return True

    def result(self) -> Reply:
        """Wait for the outcome, at most until the deadline and the worker's grace.

        :returns: what the function returned.
        :raises DeadlineExceeded: it did not end in time.
        :raises CallCancelled: it was cancelled.
        :raises RuntimeError: waiting here would block the worker's own event loop; await the handle
            instead. Or the function raised what ends a program, such as ``SystemExit``.
        :raises Exception: whatever the function raised.
        """
        call = self._call
        if call.outcome is None:
            if self._would_block():
                raise RuntimeError(
                    f"waiting for {call.name} would block the event loop that it may need; "
                    "inside a coroutine, await the handle"
                )
            if not call.wait(call.give_up_at - time.monotonic()):
                self._abandon(call)
        return self._reply()

    def cancel(self) -> None:
        """Ask the function to stop. Done when it has ended, or at the deadline."""
        if self._call.outcome is None:
            self._call.ask_to_cancel()

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._arrive().__await__()

    async def _arrive(self) -> Reply:
        loop = asyncio.get_running_loop()
        arrived = loop.create_future()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_resolve, arrived)

        self._call.when_settled(wake)
        try:
            await arrived
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._reply()

    def _reply(self) -> Reply:
        call = self._call
        if call.outcome is Outcome.OK:
            reply: Reply = self._value
            return reply
        error = self._error
        if call.outcome is Outcome.ERROR and error is not None:
            if isinstance(error, Exception):
                raise error
            # Whoever guards against what a call may raise catches no SystemExit.
            raise RuntimeError(f"{call.name} raised {error!r}") from error
        allowed = (call.deadline - call.submitted) * 1e3
        if call.outcome is Outcome.CANCELLED:
            raise CallCancelled(f"{call.name} was cancelled")
        still = " and still runs" if not call.ended else ""
        raise DeadlineExceeded(
            f"{call.name} did not end within {allowed:.4g} ms{still}; its answer is dropped"
        ) from error


def _no_handle() -> None:
    """Nobody asks for the result."""


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
