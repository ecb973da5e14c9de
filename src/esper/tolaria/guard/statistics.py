"""Robust statistics of a series: median, median absolute deviation, exponential average.

Means and standard deviations would be blinded by the very spike that they should find. Positive
values are compared by their logarithm: late in training a loss is small and its noise spans
factors, not differences; on a linear scale ordinary batches would lie many deviations out.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

_EWA_DECAY = 0.95
# The deviation is never taken for less than this, as a share of the median: a series that has
# become almost constant would otherwise call its own rounding a spike.
_SMALLEST_DEVIATION = 0.01
_TINY = 1e-30


class RobustStatistics:
    """Median, median absolute deviation and exponential average of the last healthy values.

    :param window: values that median and deviation look back on.
    :ivar average: exponential average; not a number as long as there is no value.
    """

    def __init__(self, window: int) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self.average = math.nan

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, value: float, ceiling: float = math.inf) -> None:
        """Take in one finite value.

        :param ceiling: the average counts it for no more than this: one giant would blind it.
        """
        if len(self._recent) == self._recent.maxlen:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._recent.append(value)
        insort(self._sorted, value)
        if math.isnan(self.average):
            self.average = value
        else:
            self.average = _EWA_DECAY * self.average + (1 - _EWA_DECAY) * min(value, ceiling)

    @property
    def median(self) -> float:
        """Median of the window."""
        return self._sorted[len(self._sorted) // 2]

    def rank(self, above: int) -> float:
        """Return the value of the window that ``above`` others are at least as large as."""
        return self._sorted[-1 - above]

    def distance(self, value: float) -> float:
        """Return how many median absolute deviations ``value`` lies above the median."""
        ordered = self._sorted
        if ordered[0] > 0 and value > 0:
            center = math.log(ordered[len(ordered) // 2])
            distances = [abs(math.log(other) - center) for other in ordered]
            excess, smallest = math.log(value) - center, _SMALLEST_DEVIATION
        else:
            center = ordered[len(ordered) // 2]
            distances = [abs(other - center) for other in ordered]
            excess, smallest = value - center, max(_SMALLEST_DEVIATION * abs(center), _TINY)
        distances.sort()
        return excess / max(distances[len(distances) // 2], smallest)

    def state_dict(self) -> dict[str, Any]:
        """Return window and average; an average that is not there yet as None."""
        return {
            "recent": list(self._recent),
            "average": None if math.isnan(self.average) else self.average,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._recent = deque(state_dict["recent"], maxlen=self._recent.maxlen)
        self._sorted = sorted(self._recent)
        average = state_dict["average"]
        self.average = math.nan if average is None else average
