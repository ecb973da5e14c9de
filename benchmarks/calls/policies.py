"""Policies that never answer, each in its own way."""

import asyncio
import time

from esper.leyline import AdaptationCommand, SystemState


class Spins:
    """Never returns."""

    def decide(self, state: SystemState) -> AdaptationCommand | None:  # noqa: ARG002
        """Hang."""
        while True:
            pass


class Awaits:
    """Lets itself be cancelled."""

    async def decide(self, state: SystemState) -> AdaptationCommand | None:  # noqa: ARG002
        """Hang."""
        await asyncio.sleep(1e6)
        return None


class Swallows:
    """Does not let itself be cancelled."""

    async def decide(self, state: SystemState) -> AdaptationCommand | None:  # noqa: ARG002
        """Hang."""
        end = time.monotonic() + 600
        while time.monotonic() < end:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue
        return None


class Sleeps:
    """Sleeps on a thread, which nobody can stop."""

    isolation = "thread"

    def decide(self, state: SystemState) -> AdaptationCommand | None:  # noqa: ARG002
        """Hang."""
        time.sleep(600)
        return None
