"""Means with confidence intervals, paired differences, and tables."""

import math
import statistics
from collections.abc import Iterable, Sequence

from esper.kasmina.measure import gain_of


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and how far its 95 % confidence interval reaches (Student's t).

    :param values: one for each seed; of a single one the reach is infinite.
    """
    found = gain_of(values)
    return found.mean, found.high - found.mean


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``values - others`` by seed, and the reach of its interval."""
    return interval([a - b for a, b in zip(values, others, strict=True)])


def verdict(
    difference: float, reach: float, *, less_is_better: bool = False, unclear: str = "no benefit"
) -> str:
    """Say in words what a paired difference shows.

    :param unclear: what is said where the interval contains zero.
    """
    if not math.isfinite(reach):
        return "one seed shows nothing"
    if difference - reach <= 0 <= difference + reach:
        return unclear
    return "better" if (difference < 0) == less_is_better else "worse"


def spread(mean: float, reach: float, digits: int = 1) -> str:
    """Return a mean with its interval."""
    if not math.isfinite(reach):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {reach:.{digits}f}"


def signed(mean: float, reach: float, digits: int = 1) -> str:
    """Return a difference with its interval."""
    told = spread(mean, reach, digits)
    return told if told.startswith("-") else f"+{told}"


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a page; the first column holds names, the others numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
