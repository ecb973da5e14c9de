"""Times of ways that take turns, and ratios within a round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from calls.measures import Arm, duration, no_op, show

Times = Mapping[str, list[float]]


class Goal(NamedTuple):
    """What a way may take at most, in multiples of a floor."""

    most: float
    floor: str


def times_of(
    arms: Mapping[str, Arm],
    rounds: int,
    nbytes: int,
    *,
    before: Mapping[str, Arm] | None = None,
    after: Callable[[object], object] | None = None,
) -> dict[str, list[float]]:
    """Return seconds of each arm in each round; every round has each arm once, in any order.

    A way that allocates would pay for pages that the machine has to find first, or profit from
    those that the way before it has given back: so many bytes are made ready before each.

    :param before: what an arm needs beforehand; it is not timed.
    :param after: is given what an arm returned; it is not timed either.
    """
    order = list(arms)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    # The first round warms up, and makes the files that others read.
    for turn in range(rounds + 1):
        for name in order:
            (before or {}).get(name, no_op)()
            np.empty(nbytes, np.uint8).fill(1)
            began = time.perf_counter()
            value = arms[name]()
            seconds = time.perf_counter() - began
            if after is not None:
                after(value)
            del value
            if turn:
                times[name].append(seconds)
        shuffle(order)
    return times


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
