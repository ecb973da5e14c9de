"""Looks after a worker from outside its event loop, for as long as calls are under way."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable

from esper.core.worker.call import Call, Isolation
from esper.core.worker.coroutines import EventLoop
from esper.core.worker.stats import LoopStall

_INTERVAL_S = 0.05
_STALLS_KEPT = 16
# Share of a processor above which the loop is taken to spin.
_SPINNING = 0.3


class Watchdog:
    """Abandons calls that nobody waits for, finds out who blocks the loop, slows a spinning one.

    :param loop: watched.
    :param live: returns the calls whose functions still run.
    :param abandon: called with each that is past its grace.
    :param max_lag_s: seconds without a round of the loop that count as a stall.
    """

    def __init__(
        self,
        loop: EventLoop,
        live: Callable[[], Iterable[Call]],
        abandon: Callable[[Call], None],
        max_lag_s: float,
    ) -> None:
        self.stalls: deque[LoopStall] = deque(maxlen=_STALLS_KEPT)
        self.stalls_total = 0
        self._loop = loop
        self._live = live
        self._abandon = abandon
        self._max_lag_s = max_lag_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._beat_sent: float | None = None
        self._culprit: tuple[str, str] | None = None
        self._loop_seconds = 0.0

    def rouse(self) -> None:
        """Watch: there are calls. Costs next to nothing when it does already."""
        if not self._wake.is_set():
            with self._lock:
                if self._thread is None and not self._closed.is_set():
                    self._thread = threading.Thread(
                        target=self._serve, name="esper-watchdog", daemon=True
                    )
                    self._thread.start()
            self._wake.set()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed.set()
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(1.0)

    def _serve(self) -> None:
        while True:
            self._wake.wait()
            if self._closed.is_set():
                return
            self._wake.clear()
            # A call that began before this line is seen by it, one that begins later sets it anew.
            calls = list(self._live())
            if calls:
                self._look_at(calls)
                self._wake.set()
            self._closed.wait(_INTERVAL_S)

    def _look_at(self, calls: list[Call]) -> None:
        now = time.monotonic()
        for call in calls:
            if call.outcome is None and now >= call.give_up_at:
                self._abandon(call)
        coroutines = [call for call in calls if call.isolation is Isolation.ASYNC]
        if coroutines:
            self._time_loop(now)
            spins = self._loop_share() > _SPINNING
            if spins and any(now > call.give_up_at or call.cancel_asked for call in coroutines):
                self._loop.throttle()

    def _time_loop(self, now: float) -> None:
        """Send the loop a beat, and hold it against the loop when it does not come through."""
        if self._beat_sent is None:
            self._beat_sent = now
            self._loop.post(self._take_beat)
        elif now - self._beat_sent > self._max_lag_s and self._culprit is None:
            self._culprit = (self._loop.running(), self._stack())

    def _take_beat(self) -> None:
        """On the loop: it has come round."""
        sent, culprit = self._beat_sent, self._culprit
        if culprit is not None and sent is not None:
            self.stalls.append(LoopStall(culprit[0], time.monotonic() - sent, culprit[1]))
            self.stalls_total += 1
        self._culprit = self._beat_sent = None

    def stall_under_way(self) -> LoopStall | None:
        """Return the stall that has not ended yet."""
        sent, culprit = self._beat_sent, self._culprit
        if culprit is None or sent is None:
            return None
        return LoopStall(culprit[0], time.monotonic() - sent, culprit[1])

    def _stack(self) -> str:
        thread = self._loop.thread
        frame = None if thread is None else sys._current_frames().get(thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def _loop_share(self) -> float:
        """Return the share of a processor that the loop took since the last look."""
        thread = self._loop.thread
        if thread is None or thread.ident is None or not thread.is_alive():
            return 0.0
        seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        spent, self._loop_seconds = seconds - self._loop_seconds, seconds
        return spent / _INTERVAL_S
