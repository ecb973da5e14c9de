"""Policies that misbehave, importable from a process."""

import asyncio
import ctypes
import time

from esper.leyline import AdaptationCommand, ScaleLearningRate, SystemState


class Spins:
    """Never returns, in a loop of Python."""

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        while True:
            pass


class HoldsTheInterpreter:
    """Never returns from a call into C that keeps the interpreter to itself."""

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        ctypes.PyDLL(None).pause()
        return None


class Sleeps:
    """Never returns, on a thread that nobody can stop."""

    isolation = "thread"

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        time.sleep(20)
        return ScaleLearningRate(1e-9)


class Awaits:
    """A coroutine that never returns, and can be cancelled."""

    async def decide(self, state: SystemState) -> AdaptationCommand | None:
        await asyncio.sleep(1e6)
        return ScaleLearningRate(1e-9)


class Swallows:
    """A coroutine that takes no notice of being cancelled."""

    async def decide(self, state: SystemState) -> AdaptationCommand | None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue
        return ScaleLearningRate(1e-9)


class Counts:
    """Keeps count in a plain attribute, and asks for a cut at the third question."""

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        self.asked += 1
        return ScaleLearningRate(0.5) if self.asked == 3 else None


class Answers:
    """Gives the answer that it was made with."""

    isolation = "thread"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        return self.answer  # type: ignore[return-value]
