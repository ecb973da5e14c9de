"""Confidence intervals of a mean, by Student's t distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    :param reach: from the mean to either end; infinite for a single value.
    :param count: values behind it.
    """

    mean: float
    reach: float
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.reach


def interval(values: Sequence[float]) -> Interval | None:
    """Return mean and 95 % confidence interval of independent values; None without any."""
    if not values:
        return None
    count = len(values)
    mean = statistics.fmean(values)
    if count == 1:
        return Interval(mean, math.inf, 1)
    reach = quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, reach, count)


def quantile(freedom: int) -> float:
    """Return the ``t`` that Student's distribution does not exceed in size with 95 %.

    :param freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Return the probability that the size of Student's variable is below ``t``.

    By the finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (step - 1) / step
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
