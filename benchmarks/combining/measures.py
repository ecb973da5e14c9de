"""Times taken in turns, and peak memory."""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Call = Callable[[], object]

SLOW_SECONDS = 1.0
_STATUS = Path("/proc/self/status")


def settle() -> None:
    """Take two things out of the picture that hit whichever arm happens to run.

    Threads stay on a core of their own: two that share one wait for each other, for milliseconds at
    every parallel loop. OpenMP reads that when it is loaded, so that the program starts anew. And
    glibc keeps freed memory, which would be mapped and zeroed anew in every step.
    """
    if "OMP_PROC_BIND" not in os.environ:
        os.environ.update({"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"})
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def medians(arms: Mapping[str, Call], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Return the median time of each arm in seconds, all taken in turns.

    :param seconds: about how long each arm is timed; an arm that takes a second is timed once.
    :param least: rounds at least.
    """
    first = {name: min(_time(call), _time(call)) for name, call in arms.items()}
    quick = {name: call for name, call in arms.items() if first[name] < SLOW_SECONDS}
    longest = max((first[name] for name in quick), default=1.0)
    rounds = max(least, min(400, int(seconds / longest)))
    times: dict[str, list[float]] = {name: [] for name in quick}
    for _ in range(rounds):
        for name, call in quick.items():
            times[name].append(_time(call))
    return {name: statistics.median(times[name]) if name in quick else first[name] for name in arms}


def _time(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_megabytes(call: Call) -> float | None:
    """Return by how much a call raises the memory in use, at its peak; None where unknown."""
    if not _STATUS.exists():
        return None
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> float:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {key}")
