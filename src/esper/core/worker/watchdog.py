"""Looks after a worker from outside its event loop, for as long as calls are under way."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from esper.core.worker.call import Call, Isolation
from esper.core.worker.coroutines import EventLoop
from esper.core.worker.stats import LoopStall

_INTERVAL_S = 0.05
_STALLS_KEPT = 16
# Share of a processor above which the loop is taken to spin.
_SPINNING = 0.03


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
        self._beat: tuple[float, float] = (0.0, 0.0)
        self._loop_share = 0.0

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
            # Or it would keep arguments and results alive until the next call.
            del calls
            self._closed.wait(_INTERVAL_S)

    def _look_at(self, calls: list[Call]) -> None:
        now = time.monotonic()
        for call in calls:
            if call.outcome is None and now >= call.give_up_at:
                self._abandon(call)
        coroutines = [call for call in calls if call.isolation is Isolation.ASYNC]
        if coroutines:
            self._time_loop(now)
        if self._loop_share > _SPINNING and any(_overstays(call, now) for call in coroutines):
            self._loop.throttle()

    def _time_loop(self, now: float) -> None:
        """Send the loop a beat, and hold it against the loop when it does not come through."""
        sent = self._beat_sent
        if sent is None:
            self._beat_sent = now
            self._loop.post(self._take_beat)
        elif now - sent > self._max_lag_s and self._culprit is None:
            culprit = (self._loop.running(), self._loop.stack())
            with self._lock:
                if self._beat_sent == sent:
                    self._culprit = culprit

    def _take_beat(self) -> None:
        """On the loop: it has come round."""
        now, seconds = time.monotonic(), time.thread_time()
        (then, seconds_then), self._beat = self._beat, (now, seconds)
        self._loop_share = (seconds - seconds_then) / max(now - then, _INTERVAL_S)
        with self._lock:
            sent, culprit = self._beat_sent, self._culprit
            self._culprit = self._beat_sent = None
        if culprit is not None and sent is not None:
            self.stalls.append(LoopStall(culprit[0], now - sent, culprit[1]))
            self.stalls_total += 1

    def stall_under_way(self) -> LoopStall | None:
        """Return the stall that has not ended yet."""
        sent, culprit = self._beat_sent, self._culprit
        if culprit is None or sent is None:
            return None
        return LoopStall(culprit[0], time.monotonic() - sent, culprit[1])


def _overstays(call: Call, now: float) -> bool:
    return now > call.give_up_at or call.cancel_asked
