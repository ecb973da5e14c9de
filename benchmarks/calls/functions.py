"""Functions that a process can import."""

import asyncio
import time

from esper.core import check_cancelled


async def nothing_async() -> None:
    """Return."""


def nothing() -> None:
    """Return."""


async def sleep_async(seconds: float) -> None:
    """Wait, and let oneself be cancelled."""
    await asyncio.sleep(seconds)


async def swallow(seconds: float) -> None:
    """Wait, and do not let oneself be cancelled."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            continue


def sleep(seconds: float) -> None:
    """Wait, and ask nobody."""
    time.sleep(seconds)


def ask(seconds: float) -> None:
    """Wait, and ask each millisecond whether to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_cancelled()
        time.sleep(0.001)


def spin() -> None:
    """Never return."""
    while True:
        pass


def same(value: object) -> object:
    """Return what was given."""
    return value
