"""How the calls of a worker went, by name."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.core.latency import LatencyHistogram
from esper.core.worker.call import Isolation, Outcome

# Names are meant to be few; one made up for each call must not eat the memory.
_MOST_NAMES = 256
OTHERS = "(others)"


@dataclass
class CallStats:
    """How the calls of one name went.

    :ivar outcomes: how many ended in each way.
    :ivar latency: seconds from submission to outcome; refused ones are not in it.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)


@dataclass(frozen=True)
class LiveCall:
    """A call whose function still runs.

    :param name: of the call.
    :param isolation: where it runs.
    :param age_s: seconds since it was submitted.
    :param overdue_s: seconds since its deadline; negative before.
    :param stack: where it is, as in a traceback; empty for a process.
    """

    name: str
    isolation: Isolation
    age_s: float
    overdue_s: float
    stack: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.isolation}, {self.age_s:.3g} s old)\n{self.stack}".rstrip()


@dataclass(frozen=True)
class LoopStall:
    """A time in which the event loop did not come round.

    :param culprit: the call that had it; empty when another thread held the interpreter.
    :param seconds: how long, so far as was seen.
    :param stack: where the loop's thread was.
    """

    culprit: str
    seconds: float
    stack: str


@dataclass(frozen=True)
class WorkerStats:
    """A worker at one moment.

    :param live: calls whose function still runs; each takes a slot.
    :param max_concurrency: slots.
    :param calls: how calls went, by name.
    :param stalls: the last stalls of the event loop, oldest first.
    :param stalls_total: all of them.
    :param children: processes, idle ones included.
    """

    live: tuple[LiveCall, ...]
    max_concurrency: int
    calls: Mapping[str, CallStats]
    stalls: tuple[LoopStall, ...]
    stalls_total: int
    children: int

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many submissions ended in each way."""
        total: Counter[Outcome] = Counter()
        for stats in self.calls.values():
            total += stats.outcomes
        return total


@dataclass(frozen=True)
class ShutdownReport:
    """What closing a worker came to.

    :param seconds: how long it took.
    :param left: calls whose function still ran when the time was up.
    """

    seconds: float
    left: tuple[LiveCall, ...]


class Tally:
    """Counts outcomes by name; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self.calls: dict[str, CallStats] = {}

    def add(self, name: str, outcome: Outcome, latency_s: float | None) -> None:
        """Count one submission."""
        stats = self.calls.get(name)
        if stats is None:
            name = name if len(self.calls) < _MOST_NAMES else OTHERS
            stats = self.calls.setdefault(name, CallStats())
        stats.outcomes[outcome] += 1
        if latency_s is not None:
            stats.latency.add(latency_s)

    def copy(self) -> dict[str, CallStats]:
        """Return the counts as they are."""
        return {
            name: CallStats(Counter(stats.outcomes), stats.latency.copy())
            for name, stats in self.calls.items()
        }
