"""The emergency level of a run: raised from anywhere, lowered on purpose, acted on by the loop."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from esper.leyline import EmergencyLevel, EmergencySignal
from esper.tolaria.emergency.broadcast import Announce, Broadcasts
from esper.tolaria.emergency.bucket import TokenBucket
from esper.tolaria.emergency.notices import Notices
from esper.tolaria.emergency.word import EmergencyWord, WordState

_COUNTERS = ("escalations", "suppressed", "late_acts")
_PAUSE_S = 0.005


@dataclass(frozen=True)
class Identity:
    """Whose emergencies these are.

    :param run: name of the run.
    :param step: returns the steps it has taken.
    """

    run: str
    step: Callable[[], int]


@dataclass(frozen=True)
class Escalation:
    """What became of one call to :meth:`EmergencyController.escalate`.

    :param level: that was asked for.
    :param reason: why.
    :param origin: by whom.
    :param time: seconds since the Unix epoch.
    :param latency_ms: milliseconds that setting the word and handing over the broadcast took.
    :param suppressed: it repeated what is known, too often to be passed on.
    :param error: why the word could not be set; empty when it was.
    """

    level: EmergencyLevel
    reason: str
    origin: str
    time: float
    latency_ms: float = 0.0
    suppressed: bool = False
    error: str = ""


@dataclass(frozen=True)
class Order:
    """A level that the run has not acted on yet.

    :param level: what it is now; NONE when an emergency is over.
    :param reason: why.
    :param origin: by whom.
    :param sequence: number of the writing in the word.
    :param issued_ns: when, on ``time.monotonic_ns``.
    """

    level: EmergencyLevel
    reason: str
    origin: str
    sequence: int
    issued_ns: int


class EmergencyController:
    """Raises and lowers the level, tells other processes and whoever listens, and hears of theirs.

    The level only rises, until it is lowered on purpose or a healthy epoch has passed. Raising it
    always passes; repeats are limited. Any thread may call any method.

    :param word: how processes of this host tell each other. A level left in it is cleared.
    :param broadcasts: tell others.
    :param identity: whose emergencies these are.
    :param bucket: limits repeats.
    :param announce: takes events: name, message, level, data.
    :ivar level: the present level.
    :ivar reason: why; empty without an emergency.
    :ivar since: when it was set, in seconds since the Unix epoch; None without an emergency.
    :ivar last_escalation: what became of the last escalation; it outlives a reset.
    """

    def __init__(
        self,
        word: EmergencyWord,
        broadcasts: Broadcasts,
        identity: Identity,
        bucket: TokenBucket,
        announce: Announce,
    ) -> None:
        self.level = EmergencyLevel.NONE
        self.reason = ""
        self.since: float | None = None
        self.last_escalation: Escalation | None = None
        self._word = word
        self._broadcasts = broadcasts
        self._identity = identity
        self._bucket = bucket
        self._notices = Notices(announce)
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._last_act_ms: float | None = None
        self._order: Order | None = None
        self._changed = False
        self._seen = word.sequence
        self._clear_left_over()

    def escalate(
        self, level: EmergencyLevel | str | int, reason: str, *, origin: str = "engine"
    ) -> Escalation:
        """Raise the level, or repeat it.

        The word is set first; whatever goes wrong with it is told and does not stop anything.

        :raises ValueError: there is no such level, it is NONE, or there is no reason.
        """
        wanted = EmergencyLevel.parse(level)
        if wanted is EmergencyLevel.NONE:
            raise ValueError("an escalation to none lowers the level; use reset()")
        if not reason.strip():
            raise ValueError("an escalation needs a reason; say in one sentence what happened")
        began = time.perf_counter()
        with self._lock:
            self._listen()
            error = self._raise(wanted, reason, origin)
            if error is None and not self._bucket.take():
                self._counts["suppressed"] += 1
                done = Escalation(wanted, reason, origin, time.time(), suppressed=True)
            else:
                # One that does not raise the level is told all the same.
                self._tell(wanted, reason, origin)
                latency_ms = (time.perf_counter() - began) * 1e3
                done = Escalation(
                    wanted, reason, origin, time.time(), latency_ms, error=error or ""
                )
            self.last_escalation = done
        return done

    def downgrade(self, level: EmergencyLevel | str | int, reason: str = "") -> None:
        """Lower the level, to NONE as :meth:`reset` does.

        :raises ValueError: the level is not below the present one.
        """
        wanted = EmergencyLevel.parse(level)
        with self._turn():
            if wanted >= self.level:
                raise ValueError(
                    f"the level is {self.level.name.lower()}; {wanted.name.lower()} is not below it"
                )
            self._lower(wanted, reason, "engine")

    def reset(self, reason: str = "") -> None:
        """End the emergency: level, reason and timestamp are cleared, here and in the word."""
        with self._turn():
            if self.level is not EmergencyLevel.NONE:
                self._lower(EmergencyLevel.NONE, reason, "engine")

    def close_epoch(self, healthy: bool) -> None:
        """End the emergency after a whole epoch without trouble.

        The epoch in which the level changed does not count.
        """
        if self.level is EmergencyLevel.NONE:
            return
        with self._turn():
            whole, self._changed = not self._changed, False
            if whole and healthy:
                self._lower(EmergencyLevel.NONE, "a healthy epoch has passed", "engine")

    def take_order(self) -> Order | None:
        """Return the newest level that was not acted on, once; None when nothing is new."""
        if self._word.sequence == self._seen and self._order is None:
            return None
        with self._lock:
            self._listen()
            order, self._order = self._order, None
        return order

    def acted(self, order: Order) -> None:
        """Say that an order has been carried out."""
        with self._lock:
            milliseconds = (time.monotonic_ns() - order.issued_ns) / 1e6
            self._word.acknowledge(order.sequence)
            if order.level is EmergencyLevel.NONE:
                return
            self._last_act_ms = milliseconds
            late = milliseconds > order.level.act_within_s * 1e3
            self._counts["late_acts"] += late
            self._notices.acted(order.level, order.origin, milliseconds, late=late)

    def pump(self) -> None:
        """Carry broadcasts on; costs next to nothing when there are none."""
        if self._broadcasts.pending:
            with self._lock:
                self._broadcasts.pump()

    def close(self, timeout_s: float = 0.0) -> None:
        """Give broadcasts so many seconds to succeed, and let go of the word."""
        end = time.monotonic() + timeout_s
        while self._broadcasts.pending and time.monotonic() < end:
            self.pump()
            time.sleep(_PAUSE_S)
        with self._lock:
            self._word.close()

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; what was not measured is absent."""
        broadcasts = self._broadcasts
        metrics = {
            "level": float(self.level),
            "broadcasts_total": float(broadcasts.sent),
            "broadcast_failures_total": float(broadcasts.failed),
            "broadcasts_pending": float(broadcasts.pending),
            **{f"{name}_total": float(count) for name, count in self._counts.items()},
        }
        if broadcasts.last_latency_ms is not None:
            metrics["last_broadcast_latency_ms"] = broadcasts.last_latency_ms
        if self._last_act_ms is not None:
            metrics["last_act_latency_ms"] = self._last_act_ms
        return {f"tolaria.emergency.{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the broadcasts that wait, and the counters; a level does not outlive its run."""
        with self._lock:
            return {"broadcasts": self._broadcasts.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        with self._lock:
            self._broadcasts.load_state_dict(state_dict["broadcasts"])
            self._counts.update(state_dict["counts"])

    def _set(self, level: EmergencyLevel, reason: str, origin: str) -> str:
        """Set the level in word and memory; return what went wrong with the word."""
        error = ""
        issued_ns = time.monotonic_ns()
        try:
            self._seen = self._word.set(level, reason, origin)
        except (OSError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
            self._notices.word_failed(error)
        self._adopt(WordState(level, self._seen, issued_ns, 0, origin, reason))
        return error

    def _adopt(self, state: WordState) -> None:
        none = state.level is EmergencyLevel.NONE
        self._changed = not none
        self.level = state.level
        self.reason = "" if none else state.reason
        self.since = None if none else time.time()
        self._order = _order_of(state)

    def _tell(self, level: EmergencyLevel, reason: str, origin: str) -> None:
        self._counts["escalations"] += 1
        self._notices.escalated(level, reason, origin, self.level)
        signal = EmergencySignal(
            id=uuid.uuid4().hex,
            level=level,
            reason=reason,
            origin=origin,
            time=time.time(),
            run=self._identity.run,
            step=self._identity.step(),
        )
        self._broadcasts.send(signal)
        self._broadcasts.pump()

    def _lower(self, level: EmergencyLevel, reason: str, origin: str) -> None:
        before = self.level
        self._set(level, reason, origin)
        self._notices.lowered(before, level, reason, origin)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hear what others have said, and let nobody say anything until what follows is done."""
        with self._lock, self._word.turn():
            self._listen()
            yield

    def _raise(self, level: EmergencyLevel, reason: str, origin: str) -> str | None:
        """Set a level above the present one, and return what went wrong; None when it is not."""
        if level <= self.level:
            return None
        with self._turn():
            return self._set(level, reason, origin) if level > self.level else None

    def _listen(self) -> None:
        """Take over what another process has set."""
        state = None
        # A word that has been closed says nothing any more.
        with suppress(ValueError):
            if self._word.sequence != self._seen:
                state = self._word.read()
        # A writing that is under way, or torn, is looked at again next time.
        if state is None or state.sequence == self._seen:
            return
        self._seen = state.sequence
        before = self.level
        self._adopt(state)
        if state.level < before:
            self._notices.lowered(before, state.level, state.reason, state.origin)
        elif state.level is not EmergencyLevel.NONE:
            self._tell(state.level, state.reason, state.origin)

    def _clear_left_over(self) -> None:
        state = self._word.read()
        if state is not None and state.level is EmergencyLevel.NONE:
            return
        # One that was left torn is written anew: others could not read it either.
        self._set(EmergencyLevel.NONE, "left over from an earlier process", "engine")
        self._order = None
        if state is not None:
            self._notices.left_over(state.level, state.reason)


def _order_of(state: WordState) -> Order:
    return Order(state.level, state.reason, state.origin, state.sequence, state.issued_ns)
