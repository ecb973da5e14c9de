"""Which calls of a worker run, and how all the others ended."""

import os
import sys
import threading
import weakref

from esper.core.worker.call import Call, Outcome
from esper.core.worker.stats import CallStats, Tally
from esper.leyline import WorkerClosed, WorkerFull


class Ledger:
    """Gives out slots, takes them back and counts, under one lock, so that the sums are right.

    :param slots: how many functions may run at the same time.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._process = os.getpid()
        self._live: set[Call] = set()
        self._tally = Tally()
        self._closed = False
        self.renew_locks()
        _ledgers.add(self)

    def renew_locks(self) -> None:
        """Make the locks anew, which a thread held that does not exist in a forked process."""
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)

    @property
    def closed(self) -> bool:
        """Whether it gives out no more slots; a forked process has none to give."""
        return self._closed or self._process != os.getpid()

    def admit(self, call: Call) -> None:
        """Give a call a slot.

        :raises WorkerFull: all are taken.
        :raises WorkerClosed: none is given out any more.
        """
        with self._lock:
            closed = self.closed
            if not closed and self._has_room(call.parent):
                self._live.add(call)
                return
            self._tally.add(call.name, Outcome.REFUSED, None)
            running = ", ".join(sorted({live.name for live in self._live}))
        if closed:
            raise WorkerClosed(f"{call.name} was refused: the worker is closed")
        raise WorkerFull(f"{call.name} was refused: all {self.slots} slots are taken by {running}")

    def end(self, call: Call, value: object, error: BaseException | None) -> None:
        """Take the slot of a function that has ended, and tell how it ended; once."""
        outcome = call.judge(error)
        with self._ended:
            if call not in self._live:
                return
            call.ended = True
            self._live.discard(call)
            # In the same breath: whoever sees no call any more sees all of them counted.
            settled = self._settle(call, outcome, value, error)
            self._ended.notify_all()
        if settled:
            call.announce()

    def abandon(self, call: Call) -> None:
        """Tell the caller that a function has not ended in time, and have it stopped."""
        with self._lock:
            settled = self._settle(call, Outcome.ABANDONED, None, None)
        if settled:
            call.announce()
        call.ask_to_cancel()

    def close(self) -> None:
        """Give out no more slots."""
        with self._lock:
            self._closed = True

    def wait_until_empty(self, timeout_s: float) -> list[Call]:
        """Wait for all functions to end, and return the calls of those that have not."""
        with self._ended:
            self._ended.wait_for(lambda: not self._live, timeout_s)
            return list(self._live)

    def live(self) -> list[Call]:
        """Return the calls whose functions run."""
        with self._lock:
            return list(self._live)

    def read(self) -> tuple[dict[str, CallStats], list[Call]]:
        """Return counts and live calls of the same moment."""
        with self._lock:
            return self._tally.copy(), list(self._live)

    def carries_out(self, call: Call | None) -> bool:
        """Whether a call, or one that waits for it, has a slot here."""
        live = set(self.live())
        while call is not None:
            if call in live:
                return True
            call = call.parent
        return False

    def _has_room(self, parent: Call | None) -> bool:
        if len(self._live) < self.slots:
            return True
        # While a call waits for one that it submitted, its slot does no other work.
        lends = parent is not None and parent in self._live
        return lends and all(call.parent is not parent for call in self._live)

    def _settle(
        self, call: Call, outcome: Outcome, value: object, error: BaseException | None
    ) -> bool:
        settled = call.settle(outcome, value, error)
        if settled:
            self._tally.add(call.name, outcome, call.settled_at - call.submitted)
        return settled


_ledgers: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _renew_locks() -> None:
    for ledger in _ledgers:
        ledger.renew_locks()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_renew_locks)
