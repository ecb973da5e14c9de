"""How long calls take: a histogram of fixed size from which quantiles are read."""

import math
from bisect import bisect_left
from itertools import accumulate

_SHORTEST_S, _LONGEST_S = 1e-5, 1e3
_PER_OCTAVE = 4
_OCTAVES = math.ceil(math.log2(_LONGEST_S / _SHORTEST_S))
# Upper bounds of the buckets. The first also takes what is shorter; one more without a bound takes
# what is longer than the last.
_BOUNDS = [_SHORTEST_S * 2 ** (i / _PER_OCTAVE) for i in range(_OCTAVES * _PER_OCTAVE + 1)]


class LatencyHistogram:
    """Counts durations in geometric buckets of ratio 2**0.25, from 10 us to 1000 s and beyond.

    A quantile within that range is off by at most 9.1 %. One thread adds and reads at a time; hand
    a :meth:`copy` to others.

    :ivar count: durations added.
    :ivar total_s: their sum, in seconds.
    :ivar last_s: the one added last, in seconds; None before the first.
    """

    __slots__ = ("_counts", "_longest_s", "_shortest_s", "count", "last_s", "total_s")

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.last_s: float | None = None
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._shortest_s = math.inf
        self._longest_s = 0.0

    def add(self, seconds: float) -> None:
        """Take in one duration.

        :raises ValueError: it is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a latency of {seconds} s was added; give a finite duration >= 0")
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self.count += 1
        self.total_s += seconds
        self.last_s = seconds
        if seconds < self._shortest_s:
            self._shortest_s = seconds
        if seconds > self._longest_s:
            self._longest_s = seconds

    def quantile(self, q: float) -> float | None:
        """Return about the duration, in seconds, that a share ``q`` of all do not exceed.

        It is the geometric middle of the bucket in which the duration of rank ``ceil(q * count)``
        lies, but never outside of what was seen; the longest of all is exact.

        :param q: 0 to 1.
        :raises ValueError: ``q`` is out of range.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"the quantile {q} was asked for; give a share from 0 to 1")
        if not self.count:
            return None
        rank = max(1, math.ceil(q * self.count))
        if rank >= self.count:
            return self._longest_s
        index = bisect_left(list(accumulate(self._counts)), rank)
        upper = _BOUNDS[min(index, len(_BOUNDS) - 1)]
        lower = _BOUNDS[max(0, index - 1)]
        return min(max(math.sqrt(lower * upper), self._shortest_s), self._longest_s)

    def buckets(self) -> list[tuple[float, int]]:
        """Return upper bounds, in seconds, and how many durations do not exceed each.

        The bounds double from 10 us on; the last is infinite, as Prometheus expects.
        """
        cumulative = list(accumulate(self._counts))
        bounds = list(zip(_BOUNDS[::_PER_OCTAVE], cumulative[::_PER_OCTAVE], strict=False))
        return [*bounds, (math.inf, self.count)]

    def merge(self, other: "LatencyHistogram") -> None:
        """Take in everything that another has counted; its last duration becomes the last."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.total_s += other.total_s
        self.last_s = self.last_s if other.last_s is None else other.last_s
        self._shortest_s = min(self._shortest_s, other._shortest_s)
        self._longest_s = max(self._longest_s, other._longest_s)

    def copy(self) -> "LatencyHistogram":
        """Return one that counts on by itself."""
        other = LatencyHistogram()
        other.merge(self)
        return other
