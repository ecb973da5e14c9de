"""Ratios of figures that were taken in the same round."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from calls.measures import duration, show

Times = Mapping[str, list[float]]


class Goal(NamedTuple):
    """What a way may take at most, in multiples of a floor."""

    most: float
    floor: str


def ratios(times: Times, name: str, floor: str) -> list[float]:
    return [taken / base for taken, base in zip(times[name], times[floor], strict=True)]


def report(
    title: str,
    times: Times,
    nbytes: int,
    floors: Sequence[str],
    goals: Mapping[str, Sequence[Goal]],
) -> None:
    """Print a table of times and of ratios to each floor, with what was wanted.

    :param floors: which of the ways the others are compared with.
    :param goals: by way; those of other tables are passed over.
    """
    rows = []
    for name, taken in times.items():
        median = statistics.median(taken)
        row = [name, duration(median), duration(min(taken)), f"{nbytes / median / 1e9:.2f}"]
        row += [_spread(ratios(times, name, floor)) for floor in floors]
        row.append("; ".join(_verdict(times, name, goal) for goal in goals.get(name, ())))
        rows.append(row)
    heads = [f"to {floor}: median (least to most)" for floor in floors]
    show(title, ("way", "median", "best", "GB/s", *heads, "goal"), rows)


def _spread(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _verdict(times: Times, name: str, goal: Goal) -> str:
    found = statistics.median(ratios(times, name, goal.floor))
    return f"<= {goal.most:g} x {goal.floor}: {'reached' if found <= goal.most else 'missed'}"
