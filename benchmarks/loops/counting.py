"""Counting the calls that a step makes: the same number on every machine."""

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

# One-time work in the shortest run, spread over the steps between, may show as this much.
_TOLERANCE = 2.0


def count_calls(function: Callable[[], None]) -> Counter[str]:
    """Return how often each Python function was called on this thread, by file and name.

    Calls into C are counted together as ``<c>``. Resuming a generator counts as a call.
    """
    counts: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            counts[f"{code.co_filename}:{code.co_qualname}"] += 1
        elif event == "c_call":
            counts["<c>"] += 1

    previous = threading.getprofile()
    # A collection would run the finalizers of whoever was here before on this thread.
    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(previous)
        gc.enable()
    return counts


def per_step(run: Callable[[int], None], short: int, long: int) -> Counter[str]:
    """Return the calls of one step: the difference between two lengths, start and end cancelled.

    :param run: trains for a number of steps.
    :raises RuntimeError: the steps in between do not all make the same calls.
    """
    middle = (short + long) // 2
    run(short)
    counts = {steps: _least_calls(run, steps) for steps in (short, middle, long)}
    first = _difference(counts[middle], counts[short], middle - short)
    second = _difference(counts[long], counts[middle], long - middle)
    if abs(python_calls(first) - python_calls(second)) > _TOLERANCE:
        raise RuntimeError(
            f"steps differ: {python_calls(first)} and then {python_calls(second)} calls each"
        )
    return second


def python_calls(counts: Counter[str]) -> float:
    """Return the calls of Python functions."""
    return sum(count for name, count in counts.items() if name != "<c>")


def _least_calls(run: Callable[[int], None], steps: int) -> Counter[str]:
    # What is there only now and then (a thread that was slow, a queue that was full) adds calls.
    return min((count_calls(lambda: run(steps)) for _ in range(2)), key=python_calls)


def _difference(more: Counter[str], less: Counter[str], steps: int) -> Counter[str]:
    rates: Counter[str] = Counter()
    for name in more:
        rate = (more[name] - less[name]) / steps
        if rate:
            rates[name] = rate  # type: ignore[assignment]  # a mean of counts
    return rates
