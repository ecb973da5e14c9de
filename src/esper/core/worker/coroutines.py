"""The event loop that all coroutines run on, on a thread of its own."""

import asyncio
import inspect
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio

from esper.core.worker.call import Call, current_call
from esper.core.worker.threads import DaemonExecutor

_BREATH_S = 0.01

End = Callable[[Call, object, BaseException | None], None]


class EventLoop:
    """Runs coroutines under their deadlines.

    Cancellation goes through anyio's scopes: it is delivered again until the coroutine has ended,
    since Python 3.11 loses a cancel that arrives together with a result, and a coroutine may
    swallow one. Inside of a call, cleanup that has to await something needs
    ``anyio.CancelScope(shield=True)``.

    :param end: told when a coroutine has ended.
    :param executor: carries out what asyncio hands to threads, such as looking up a name.
    """

    def __init__(self, end: End, executor: DaemonExecutor) -> None:
        self._end = end
        self._executor = executor
        self._lock = threading.Lock()
        self._tasks: dict[Call, asyncio.Task[None]] = {}
        self._scopes: dict[Call, anyio.CancelScope] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._throttled = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def thread(self) -> threading.Thread | None:
        """The thread of the loop, once there is one."""
        return self._thread

    def here(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return self._thread is threading.current_thread()

    def start(self, call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Run ``function(*arguments)``, which returns an awaitable; False when it is closed."""
        return self.post(self._begin, call, function, arguments)

    def post(self, callback: Callable[..., None], *arguments: Any) -> bool:  # noqa: ANN401
        """Have the loop call something; False when it is closed."""
        loop = self._loop or self._open()
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            return False
        return True

    def running(self) -> str:
        """Return the name of the call that has the loop at this moment; empty if none does."""
        task = None if self._loop is None else asyncio.current_task(self._loop)
        return "" if task is None else task.get_name()

    def stack(self) -> str:
        """Return where the loop's thread is."""
        thread = self._thread
        frame = None if thread is None else sys._current_frames().get(thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def stack_of(self, call: Call) -> str:
        """Return where a coroutine is, suspended or not."""
        task, loop = self._tasks.get(call), self._loop
        if task is None or loop is None:
            return ""
        if asyncio.current_task(loop) is task:
            return self.stack()
        lines: list[str] = []
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is None:
                break
            lines += traceback.format_stack(frame, limit=1)
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
        return "".join(lines)

    def throttle(self) -> None:
        """Slow the loop down for as long as a coroutine outlives its deadline.

        One that swallows its cancellation is cancelled anew in each round of the loop. Without a
        pause that keeps the interpreter busy, at the cost of the thread that trains.
        """
        if not self._throttled:
            self._throttled = True
            self.post(self._breathe)

    def close(self, timeout_s: float) -> bool:
        """Stop the loop: what still is suspended in it never runs again.

        :returns: False when something blocks it; it then stops as soon as it can.
        """
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return True
        self.post(loop.stop)
        thread.join(timeout_s)
        return not thread.is_alive()

    def _open(self) -> asyncio.AbstractEventLoop | None:
        with self._lock:
            if self._loop is None and not self._closed:
                loop = asyncio.new_event_loop()
                loop.set_exception_handler(_report)
                loop.set_default_executor(self._executor)
                self._thread = threading.Thread(
                    target=self._serve, args=(loop,), name="esper-loop", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while not self._closed:
                # A task that a call has made may raise what asyncio lets through.
                with suppress(SystemExit, KeyboardInterrupt):
                    loop.run_forever()
        finally:
            self._drop_unstarted()
            # Async generators belong to calls, which have ended or are lost.
            loop.close()

    def _drop_unstarted(self) -> None:
        for call, task in list(self._tasks.items()):
            work: Any = task.get_coro()
            if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                work.close()
                del self._tasks[call]
                self._end(call, None, asyncio.CancelledError())

    def _begin(self, call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        work = self._run(call, function, arguments)
        self._tasks[call] = asyncio.get_running_loop().create_task(work, name=call.name)

    async def _run(
        self, call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        value: object = None
        error: BaseException | None = asyncio.CancelledError()
        current_call.set(call)
        try:
            with anyio.CancelScope() as scope:
                self._scopes[call] = scope
                self._set_alarm(call.deadline)
                call.on_cancel(partial(self._cancel, scope))
                value = await function(*arguments)
                error = None
        except BaseException as raised:  # noqa: BLE001 - handed to whoever asks for the result
            error = raised
        del self._tasks[call]
        self._scopes.pop(call, None)
        self._end(call, value, error)
        # An error knows this frame: without the names there is no cycle to be collected.
        del call, value, error

    def _set_alarm(self, deadline: float) -> None:
        """Have the earliest deadline kept: one timer for all costs less than one for each."""
        alarm = self._alarm
        if alarm is None or deadline < alarm.when():
            if alarm is not None:
                alarm.cancel()
            self._alarm = asyncio.get_running_loop().call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = time.monotonic()
        for call, scope in self._scopes.items():
            if call.deadline > now:
                self._set_alarm(call.deadline)
            elif not scope.cancel_called:
                scope.cancel()

    def _cancel(self, scope: anyio.CancelScope) -> None:
        if self.here():
            scope.cancel()
        else:
            self.post(scope.cancel)

    def _breathe(self) -> None:
        now = time.monotonic()
        if all(now < call.deadline and not call.cancel_asked for call in self._tasks):
            self._throttled = False
            return
        time.sleep(_BREATH_S)
        asyncio.get_running_loop().call_soon(self._breathe)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Leave out what closing has told already: tasks that were left behind."""
    if context.get("task") is None or context.get("exception") is not None:
        loop.default_exception_handler(context)
