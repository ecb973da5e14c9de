"""One profile of a run, from the wish to the trace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from esper.core.worker import AsyncWorker, WorkerHandle
from esper.leyline import WorkerClosed, WorkerFull
from esper.tolaria.profiler.course import Course
from esper.tolaria.profiler.recording import ProfilerError, Recording, preload
from esper.tolaria.profiler.window import Window
from esper.tolaria.profiler.writer import Trace, TraceWriter

_IMPORT_S = 120.0

Cause = Literal["scheduled", "requested", "slow_step"]


@dataclass(frozen=True, slots=True)
class Wish:
    """A profile that is wanted.

    :param cause: why.
    :param window: its steps.
    :param request: name of the request to be answered; empty when nobody waits.
    """

    cause: Cause
    window: Window
    request: str = ""


class Session:
    """Carries out one wish at a time; what becomes of it is told, not raised.

    :param writer: writes the traces.
    :param worker: imports what torch's profiler needs, so that training need not wait for it.
    :param done: told what came of each cycle of a wish.
    """

    def __init__(
        self,
        writer: TraceWriter,
        worker: AsyncWorker,
        done: Callable[[Wish, Trace | ProfilerError], None],
    ) -> None:
        self.overhead_ms: float | None = None
        self._writer = writer
        self._worker = worker
        self._done = done
        self._wish: Wish | None = None
        self._course: Course | None = None
        self._told = 0
        self._import: WorkerHandle[None] | None = None
        self._imported = False

    @property
    def busy(self) -> bool:
        """Whether a wish is being carried out."""
        return self._wish is not None

    @property
    def request(self) -> str:
        """Name of the request that is being carried out; empty when there is none."""
        return "" if self._wish is None else self._wish.request

    def begin(self, wish: Wish) -> None:
        """Take a wish; its window is counted from the next :meth:`enter`."""
        self._wish, self._course = wish, Course(wish.window)
        self._told = 0
        self.overhead_ms = 0.0
        if not self._imported and self._import is None:
            try:
                self._import = self._worker.submit(
                    preload, timeout_s=_IMPORT_S, name="tolaria.profiler", isolation="thread"
                )
            except (WorkerFull, WorkerClosed):
                # Then the recording imports it, and training waits.
                self._imported = True

    def leave(self) -> None:
        """End a step."""
        self._writer.poll()
        if self._course is None:
            return
        began = time.perf_counter()
        self._hand_over(self._course.leave)
        self._add(began)
        if self._course.over and not self._writer.busy:
            self._wish = self._course = None

    def enter(self, step: int) -> None:
        """Begin a step.

        :param step: number that it goes by in the trace.
        """
        if self._course is None:
            return
        began = time.perf_counter()
        ready = self._is_imported() and not self._writer.busy
        try:
            self._course.enter(step, ready=ready)
        except ProfilerError as error:
            self._tell(error)
        self._add(began)

    def drop(self) -> str | None:
        """End what is being recorded and throw it away, since nobody waits for it any more.

        :returns: what that led to; None when there was nothing to end, or it is being written.
        """
        course = self._course
        if course is None or course.over:
            return None
        self._wish = self._course = None
        try:
            course.close()
        except ProfilerError as error:
            return str(error)
        return "what was recorded is thrown away"

    def close(self) -> None:
        """End what is under way, with what it has, and wait until it is written."""
        self._writer.finish()
        if self._course is not None:
            self._hand_over(self._course.close)
            self._writer.finish()
            if not self._told:
                self._tell(ProfilerError("the run ended before the window opened"))
        self._wish = self._course = None

    def _is_imported(self) -> bool:
        if self._import is not None and self._import.done():
            # What the import raises, the recording raises again, where it is told.
            self._import, self._imported = None, True
        return self._imported

    def _hand_over(self, end: Callable[[], Recording | None]) -> None:
        try:
            recording = end()
        except ProfilerError as error:
            self._tell(error)
            return
        if recording is not None:
            self._writer.write(recording, self._tell)

    def _tell(self, outcome: Trace | ProfilerError) -> None:
        self._told += 1
        if self._wish is not None:
            self._done(self._wish, outcome)

    def _add(self, began: float) -> None:
        self.overhead_ms = (self.overhead_ms or 0.0) + (time.perf_counter() - began) * 1e3
