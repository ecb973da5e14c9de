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
    :ivar highest: highest value of the window.
    :ivar count: values in the window.
    """

    def __init__(self, window: int) -> None:
        self.average = math.nan
        self.highest = -math.inf
        self.count = 0
        self._window = window
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float, ceiling: float = math.inf) -> None:
        """Take in one finite value.

        :param ceiling: the average counts it for no more than this: one giant would blind it.
        """
        ordered = self._sorted
        if self.count == self._window:
            del ordered[bisect_left(ordered, self._recent.popleft())]
        else:
            self.count += 1
        self._recent.append(value)
        insort(ordered, value)
        self.highest = ordered[-1]
        if self.count == 1:
            self.average = value
        else:
            self.average = _EWA_DECAY * self.average + (1 - _EWA_DECAY) * min(value, ceiling)

    @property
    def median(self) -> float:
        """Median of the window."""
        return self._sorted[self.count // 2]

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
        """Return window and average; without any value, an average of 0."""
        return {"recent": list(self._recent), "average": self.average if self.count else 0.0}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`; of a longer window, the newest values are taken."""
        self._recent = deque(state_dict["recent"][-self._window :])
        self._sorted = sorted(self._recent)
        self.count = len(self._recent)
        self.highest = self._sorted[-1] if self.count else -math.inf
        self.average = state_dict["average"] if self.count else math.nan
