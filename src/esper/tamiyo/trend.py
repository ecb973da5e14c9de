"""How fast a noisy series falls: a robust slope with a confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Trend:
    """A slope and how sure it is.

    :param slope: change of the values per unit of time.
    :param low: lower end of its 95 % confidence interval; minus infinity from too few points.
    :param high: upper end; infinity from too few points.
    """

    slope: float
    low: float = -math.inf
    high: float = math.inf


def theil_sen(times: Sequence[float], values: Sequence[float]) -> Trend | None:
    """Return the median of all pairwise slopes, with Sen's interval by Kendall's statistic.

    One value in four may be wild without effect. Below five points there is no interval of 95 %.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968.

    :param times: when each value was measured.
    :param values: finite.
    :returns: None where there are no two distinct times.
    """
    pairs = combinations(zip(times, values, strict=True), 2)
    slopes = np.sort([(b - a) / (t - s) for (s, a), (t, b) in pairs if t != s])
    if slopes.size == 0:
        return None
    middle = float(np.median(slopes))
    count = len(times)
    reach = _NORMAL_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    rank = round((slopes.size - reach) / 2)
    if rank < 1:
        return Trend(middle)
    return Trend(middle, float(slopes[rank - 1]), float(slopes[-rank]))


def progress(times: Sequence[float], losses: Sequence[float]) -> Trend | None:
    """Return by which share a loss falls per unit of time; above zero is better.

    Positive losses are compared by their logarithm, since late in training they are many times
    smaller than at first; others against their mean size.

    :param times: when each loss was measured.
    :param losses: finite.
    :returns: None where there are no two distinct times.
    """
    values = np.asarray(losses, dtype=float)
    if values.size and values.min() > 0:
        found = theil_sen(times, np.log(values).tolist())
    else:
        size = float(np.abs(values).mean()) if values.size else 0.0
        found = theil_sen(times, (values / (size or 1.0)).tolist())
    return None if found is None else Trend(-found.slope, -found.high, -found.low)
