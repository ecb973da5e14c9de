"""What is called; a process can import it.

Whatever takes long signs in to a folder and out again, so that one can count for real what still
runs, in whichever thread or process.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from esper.core import check_cancelled

_OUT = ".out"


@contextmanager
def present(folder: str) -> Iterator[None]:
    """Be counted while the block runs."""
    place = Path(folder) / f"{os.getpid()}-{time.monotonic_ns()}"
    place.touch()
    try:
        yield
    finally:
        place.with_suffix(_OUT).touch()


def began(folder: str) -> int:
    """Return how many functions have signed in."""
    return sum(place.suffix != _OUT for place in Path(folder).iterdir())


def running(folder: str) -> int:
    """Return how many of them have not ended: neither signed out nor perished with the process."""
    names = {place.name for place in Path(folder).iterdir()}
    inside = {name for name in names if not name.endswith(_OUT) and name + _OUT not in names}
    return sum(_alive(int(name.partition("-")[0])) for name in inside)


def _alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def nothing_async() -> None:
    """Return."""


def nothing() -> None:
    """Return."""


async def await_inside(inside: set[object], seconds: float) -> None:
    """Wait, and be in a set meanwhile: for more calls than one makes files for."""
    mark = object()
    inside.add(mark)
    try:
        await asyncio.sleep(seconds)
    finally:
        inside.remove(mark)


async def await_long(folder: str, seconds: float) -> None:
    """Wait, and let oneself be cancelled."""
    with present(folder):
        await asyncio.sleep(seconds)


async def swallow(folder: str, seconds: float) -> None:
    """Wait, and do not let oneself be cancelled."""
    end = time.monotonic() + seconds
    with present(folder):
        while time.monotonic() < end:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue


def sleep(folder: str, seconds: float) -> None:
    """Wait, and ask nobody."""
    with present(folder):
        time.sleep(seconds)


def ask(folder: str, seconds: float) -> None:
    """Wait, and ask each millisecond whether to stop."""
    end = time.monotonic() + seconds
    with present(folder):
        while time.monotonic() < end:
            check_cancelled()
            time.sleep(0.001)


def spin(folder: str, seconds: float) -> None:
    """Keep a processor busy."""
    end = time.monotonic() + seconds
    with present(folder):
        while time.monotonic() < end:
            pass


def double(value: Any) -> Any:
    """Return twice the array or tensor that was given."""
    return value * 2


def same(value: Any) -> Any:
    """Return what was given."""
    return value
