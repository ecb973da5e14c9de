"""The event loop that all coroutines run on, on a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio

from esper.core.worker.call import Call, current_call

_BREATH_S = 0.002

End = Callable[[Call, object, BaseException | None], None]


class EventLoop:
    """Runs coroutines under their deadlines.

    Cancellation goes through anyio's scopes: it is delivered again until the coroutine has ended,
    since Python 3.11 loses a cancel that arrives together with a result, and a coroutine may
    swallow one. Inside of a call, cleanup that has to await something needs
    ``anyio.CancelScope(shield=True)``.

    :param end: told when a coroutine has ended.
    """

    def __init__(self, end: End) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._tasks: dict[Call, asyncio.Task[None]] = {}
        self._throttled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def thread(self) -> threading.Thread | None:
        """The thread of the loop, once there is one."""
        return self._thread

    def here(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return self._thread is threading.current_thread()

    def start(self, call: Call, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Run ``function(*arguments)``, which returns an awaitable."""
        self.post(self._begin, call, function, arguments)

    def post(self, callback: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        """Have the loop call something."""
        (self._loop or self._open()).call_soon_threadsafe(callback, *arguments)

    def running(self) -> str:
        """Return the name of the call that has the loop at this moment; empty if none does."""
        task = None if self._loop is None else asyncio.current_task(self._loop)
        return "" if task is None else task.get_name()

    def stack_of(self, call: Call) -> list[Any]:
        """Return the frames at which a coroutine is suspended, outermost first."""
        task = self._tasks.get(call)
        if task is None:
            return []
        frames: list[Any] = []
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is None:
                break
            frames.append(frame)
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
        return frames

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
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return True
        if thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout_s)
        return not thread.is_alive()

    def _open(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                loop.set_exception_handler(_report)
                self._thread = threading.Thread(
                    target=_serve, args=(loop,), name="esper-loop", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop

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
            with anyio.CancelScope(deadline=call.deadline) as scope:
                call.on_cancel(partial(self._cancel, scope))
                value = await function(*arguments)
                error = None
        except BaseException as raised:  # noqa: BLE001 - handed to whoever asks for the result
            error = raised
        del self._tasks[call]
        self._end(call, value, error)
        # An error knows this frame: without the names there is no cycle to be collected.
        del call, value, error

    def _cancel(self, scope: anyio.CancelScope) -> None:
        # A call may be cancelled when the loop has been stopped; then nothing runs any more.
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


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        # Async generators and default executors belong to calls, which have ended or are lost.
        loop.close()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Leave out what closing has told already: tasks that were left behind."""
    if context.get("task") is None or context.get("exception") is not None:
        loop.default_exception_handler(context)
