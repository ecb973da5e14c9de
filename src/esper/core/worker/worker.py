"""The worker: carries out calls under deadlines that hold, and counts how each ended."""

import asyncio
import inspect
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from esper.core.worker.call import Call, Isolation, WorkerHandle, current_call
from esper.core.worker.coroutines import EventLoop
from esper.core.worker.ledger import Ledger
from esper.core.worker.processes import ProcessLane
from esper.core.worker.stats import LiveCall, ShutdownReport, WorkerStats
from esper.core.worker.threads import DaemonExecutor, DaemonThreads
from esper.core.worker.transport import Packet, encode
from esper.core.worker.watchdog import Watchdog

Reply = TypeVar("Reply")
IsolationName = Literal["async", "thread", "process"] | Isolation


class AsyncWorker:
    """Carries out calls beside the caller, each under a deadline that holds.

    A call takes a slot until its function has *ended*, whatever the caller was told; when all are
    taken, a submission is refused at once. A call submitted from inside another one may use the
    slot of that one, so that it never waits for itself, and its deadline is no later.

    :param max_concurrency: slots.
    :param shutdown_timeout_s: seconds that :meth:`shutdown` waits for functions to end.
    :param grace_s: seconds past its deadline for a function to end before it is abandoned.
    :param max_loop_lag_s: seconds for which a coroutine may block the loop without being named.
    :param preload: modules that processes find imported, if they are installed.
    :raises ValueError: a number is out of range.
    """

    def __init__(
        self,
        max_concurrency: int = 8,
        shutdown_timeout_s: float = 5.0,
        *,
        grace_s: float = 0.05,
        max_loop_lag_s: float = 0.1,
        preload: Sequence[str] = ("torch",),
    ) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}; give 1 slot or more")
        for name, seconds in (
            ("shutdown_timeout_s", shutdown_timeout_s),
            ("grace_s", grace_s),
            ("max_loop_lag_s", max_loop_lag_s),
        ):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{name} is {seconds}; give a finite number of seconds >= 0")
        self.max_concurrency = max_concurrency
        self._shutdown_timeout_s = shutdown_timeout_s
        self._grace_s = grace_s
        self._process = os.getpid()
        self._ledger = Ledger(max_concurrency)
        self._frames: dict[Call, int] = {}
        self._threads = DaemonThreads("esper-call")
        self._loop = EventLoop(self._ledger.end, DaemonExecutor(self._threads))
        self._processes = ProcessLane(preload, self._threads.run)
        self._watchdog = Watchdog(
            self._loop, self._ledger.live, self._ledger.abandon, max_loop_lag_s
        )

    def __enter__(self) -> "AsyncWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def closed(self) -> bool:
        """Whether it takes no calls any more."""
        return self._ledger.closed

    def submit(
        self,
        function: Callable[..., Reply] | Callable[..., Coroutine[Any, Any, Reply]],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float,
        name: str | None = None,
        isolation: IsolationName | None = None,
    ) -> WorkerHandle[Reply]:
        """Start ``function(*arguments)`` and return at once.

        :param timeout_s: seconds from now until the deadline; all that happens until the function
            has ended counts.
        :param name: under which the call is counted; the function's own by default. Use few.
        :param isolation: ``"async"`` runs a coroutine function on the worker's event loop and
            cancels it at the deadline. ``"thread"`` is for a function that calls
            :func:`~esper.core.check_cancelled` now and then, or that is known to return: a thread
            cannot be stopped. ``"process"`` kills, whatever the function does; it and its arguments
            must be importable and serialisable, are copied, and what the function changes in them
            stays in the child. By default a coroutine function is ``"async"`` and every other one
            ``"process"``.
        :raises WorkerFull: all slots are taken.
        :raises WorkerClosed: the worker is closed, or this process was forked from its own.
        :raises TypeError: the function does not suit the isolation, or cannot be sent.
        :raises ValueError: the timeout is negative or not finite, or the isolation unknown.
        """
        lane = choose_isolation(function, isolation)
        if not 0 <= timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; give a finite number of seconds >= 0")
        name = _name_of(function) if name is None else name
        call = Call(name, lane, timeout_s, self._grace_s, current_call.get())
        handle: WorkerHandle[Reply] = WorkerHandle(call, self._ledger.abandon, self._loop.here)
        try:
            self._ledger.admit(call)
            self._watchdog.rouse()
            self._launch(call, function, arguments)
        except BaseException as error:
            self._ledger.end(call, None, error)
            raise
        return handle

    def call(
        self,
        function: Callable[..., Reply] | Callable[..., Coroutine[Any, Any, Reply]],
        *arguments: Any,  # noqa: ANN401
        timeout_s: float,
        name: str | None = None,
        isolation: IsolationName | None = None,
    ) -> Reply:
        """Submit, wait, and return the result.

        Takes and raises what :meth:`submit` and :meth:`WorkerHandle.result` do.
        """
        handle: WorkerHandle[Reply] = self.submit(
            function, *arguments, timeout_s=timeout_s, name=name, isolation=isolation
        )
        return handle.result()

    def warm_up(self) -> None:
        """Start a process in the background, so that the first call need not wait for it."""
        self._processes.warm_up()

    def stats(self) -> WorkerStats:
        """Return what runs and how the calls so far went."""
        calls, live = self._ledger.read()
        stall = self._watchdog.stall_under_way()
        return WorkerStats(
            live=tuple(self._describe(call) for call in live),
            max_concurrency=self.max_concurrency,
            calls=calls,
            stalls=(*self._watchdog.stalls, *([] if stall is None else [stall])),
            stalls_total=self._watchdog.stalls_total + (stall is not None),
            children=self._processes.children,
        )

    def shutdown(self, timeout_s: float | None = None) -> ShutdownReport:
        """Take no more calls, cancel those under way, kill processes, and end the threads.

        :param timeout_s: seconds to wait for functions to end; the worker's own by default.
        :returns: what still ran when the time was up. It has no effect any more, but a function
            that blocks its thread keeps it for as long as it likes.
        :raises RuntimeError: it is called from inside one of the worker's calls.
        """
        began = time.monotonic()
        if self._process != os.getpid():
            return ShutdownReport(0.0, ())
        if self._ledger.carries_out(current_call.get()):
            raise RuntimeError("a call cannot shut down the worker that carries it out")
        # First of all: a call accepted in the same moment must not escape the cancellation.
        self._ledger.close()
        self._processes.stop_replacing()
        for call in self._ledger.live():
            call.ask_to_cancel()
        allowed = self._shutdown_timeout_s if timeout_s is None else timeout_s
        left = self._ledger.wait_until_empty(allowed)
        described = tuple(self._describe(call) for call in left)
        for call in left:
            self._ledger.abandon(call)
        self._watchdog.close()
        self._processes.close()
        self._loop.close(min(allowed, 1.0) if not left else 0.0)
        self._threads.close()
        return ShutdownReport(time.monotonic() - began, described)

    def _launch(self, call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if call.isolation is Isolation.ASYNC:
            if not self._loop.start(call, function, arguments):
                self._ledger.end(call, None, asyncio.CancelledError())
            return
        if call.isolation is Isolation.THREAD:
            work = partial(function, *arguments)
        else:
            packet = _pack(call, function, arguments)
            work = partial(self._processes.carry_out, call, packet)
        self._threads.run(partial(self._run, call, work))

    def _run(self, call: Call, work: Callable[[], object]) -> None:
        """On a thread: carry out a call."""
        self._frames[call] = threading.get_ident()
        token = current_call.set(call)
        value: object = None
        error: BaseException | None = None
        try:
            if call.cancel_asked:
                raise asyncio.CancelledError(f"{call.name} was cancelled")
            value = work()
        except BaseException as raised:  # noqa: BLE001 - handed to whoever asks for the result
            error = raised
        finally:
            current_call.reset(token)
            del self._frames[call]
        self._ledger.end(call, value, error)
        # An error knows this frame: without the names there is no cycle to be collected.
        del call, work, value, error

    def _describe(self, call: Call) -> LiveCall:
        now = time.monotonic()
        return LiveCall(
            name=call.name,
            isolation=call.isolation,
            age_s=now - call.submitted,
            overdue_s=now - call.deadline,
            stack=self._stack_of(call),
        )

    def _stack_of(self, call: Call) -> str:
        if call.isolation is Isolation.PROCESS:
            return ""
        if call.isolation is Isolation.ASYNC:
            return self._loop.stack_of(call)
        frame = sys._current_frames().get(self._frames.get(call, 0))
        return "" if frame is None else "".join(traceback.format_stack(frame))


def _pack(call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Packet:
    if sys.platform != "linux":
        raise TypeError(f"isolation='process' needs Linux; this is {sys.platform}")
    try:
        message = encode((call.name, call.deadline, function, arguments))
    except TypeError as error:
        raise TypeError(
            f"{call.name} {error}; or use isolation='thread' if it is sure to return"
        ) from error
    return Packet(message)


def _name_of(function: Callable[..., object]) -> str:
    while isinstance(function, partial):
        function = function.func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def choose_isolation(
    function: Callable[..., object], wanted: IsolationName | None = None
) -> Isolation:
    """Return where a function is to run.

    :raises ValueError: there is no such isolation.
    :raises TypeError: a coroutine function was given for a thread, or a plain one for the loop.
    """
    is_async = _is_coroutine_function(function)
    if wanted is None:
        return Isolation.ASYNC if is_async else Isolation.PROCESS
    try:
        isolation = Isolation(wanted)
    except ValueError:
        known = ", ".join(Isolation)
        raise ValueError(f"isolation is {wanted!r}; known are {known}") from None
    if isolation is Isolation.ASYNC and not is_async:
        raise TypeError(f"{function!r} is no coroutine function; use 'thread' or 'process'")
    if isolation is Isolation.THREAD and is_async:
        raise TypeError(f"{function!r} is a coroutine function; use 'async' or 'process'")
    return isolation


def _is_coroutine_function(function: Callable[..., object]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object may have an async __call__
    )
