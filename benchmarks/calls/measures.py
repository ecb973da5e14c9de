"""Interleaved rounds, medians, and tables in Markdown."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

Arm = Callable[[], object]


def no_op() -> None:
    """Neither prepare nor clear away."""


def times_of(
    arms: dict[str, Arm],
    rounds: int,
    *,
    before: dict[str, Arm] | None = None,
    after: Callable[[object], object] | None = None,
) -> dict[str, list[float]]:
    """Return seconds of each arm in each round; every round has each arm once, in turning order.

    :param before: what an arm needs beforehand; it is not timed.
    :param after: is given what an arm returned; it is not timed either.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    # The first round warms up.
    for turn in range(rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            (before or {}).get(name, no_op)()
            arm = arms[name]
            began = time.perf_counter()
            value = arm()
            seconds = time.perf_counter() - began
            if after is not None:
                after(value)
            del value
            if turn:
                times[name].append(seconds)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    size = abs(seconds)
    if size < 2e-5:
        return f"{seconds * 1e6:.2f} µs"
    if size < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if size < 1 else f"{seconds:.2f} s"


def against(seconds: float, goal_s: float | None) -> str:
    """Return a figure as a multiple of its goal; empty when it has none."""
    if goal_s is None:
        return ""
    verdict = "kept" if seconds <= goal_s else "MISSED"
    return f"{seconds / goal_s:.2f} x {duration(goal_s)}: {verdict}"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are figures."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print(f"\n**{title}**\n")
    for line in [lines[0], rule, *lines[1:]]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print(f"| {' | '.join(cells)} |", flush=True)
