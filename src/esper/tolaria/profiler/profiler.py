"""The profiler for a loop of one's own."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from esper.core.worker import AsyncWorker
from esper.tolaria.profiler.course import Course
from esper.tolaria.profiler.recording import ProfilerError
from esper.tolaria.profiler.window import Window
from esper.tolaria.profiler.writer import Trace, TraceWriter


class Profiler:
    """Records some steps of a training loop into traces that Perfetto and torch's tools read.

    Put ``with Profiler("profiles") as profiler:`` around the loop and ``profiler.step()`` at the
    end of each step. After the last cycle of its window a step costs one call.

    :param directory: receives the traces; made if it is missing.
    :param run: begins their names.
    :param window: steps to wait, warm up and record, and how often.
    :param worker: writes the traces beside the loop, and delays a cycle until the trace before is
        written; without one the loop waits for the writing.
    :param report: told of each failure; without it failures are raised, by :meth:`step` and at the
        end of the ``with`` block.
    :raises ConfigError: there is no directory, nothing can be written into it, or the window is
        not valid.
    """

    def __init__(
        self,
        directory: Path | str | None,
        *,
        run: str = "run",
        window: Window | None = None,
        worker: AsyncWorker | None = None,
        report: Callable[[ProfilerError], None] | None = None,
    ) -> None:
        self.traces: list[Trace] = []
        self.failed = 0
        self._writer = TraceWriter(directory, run, worker)
        self._course = Course(window or Window())
        self.active = False
        self._step = 0
        self._report = report
        self._untold: list[ProfilerError] = []

    def __enter__(self) -> "Profiler":
        self.active = True
        self._enter()
        self._tell()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(complete=error is None)
        if error is None or self._report is not None:
            self._tell()
            return
        # What went wrong in the loop comes first.
        for failure in self._untold:
            error.add_note(f"the profiler failed as well: {failure}")

    def step(self) -> None:
        """End a step and begin the next.

        :raises ProfilerError: a trace could not be recorded or written, and no ``report`` takes it.
        """
        if not self.active:
            return
        self._leave()
        self._step += 1
        self._writer.poll()
        self._enter()
        self.active = self._writer.busy or not self._course.over
        self._tell()

    def _enter(self) -> None:
        try:
            self._course.enter(self._step, ready=not self._writer.busy)
        except ProfilerError as error:
            self._take(error)

    def _leave(self) -> None:
        try:
            recording = self._course.leave()
        except ProfilerError as error:
            self._take(error)
            return
        if recording is not None:
            self._writer.write(recording, self._take)

    def _close(self, *, complete: bool) -> None:
        self.active = False
        self._writer.finish()
        try:
            recording = self._course.close()
        except ProfilerError as error:
            self._take(error)
            return
        if recording is not None:
            self._writer.write(recording, self._take)
            self._writer.finish()
        elif complete and not self.traces and not self.failed:
            self._take(ProfilerError("the loop ended before the window opened; nothing recorded"))

    def _take(self, outcome: Trace | ProfilerError) -> None:
        if isinstance(outcome, Trace):
            self.traces.append(outcome)
            return
        self.failed += 1
        self._untold.append(outcome)

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for failure in untold:
            if self._report is None:
                raise failure
            self._report(failure)
