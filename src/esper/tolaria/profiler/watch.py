"""The profiler of a run: on schedule, when asked from outside, and when steps have become slow."""

import time
from collections import deque
from pathlib import Path

from esper.core.config import ProfilerConfig
from esper.core.worker import AsyncWorker
from esper.leyline import ConfigError, Level, StepRecord
from esper.tolaria.profiler.names import SUFFIX
from esper.tolaria.profiler.recording import ProfilerError
from esper.tolaria.profiler.requests import MOST_STEPS, Reply, RequestBox, RequestError
from esper.tolaria.profiler.session import Session, Wish
from esper.tolaria.profiler.slow import SlowSteps
from esper.tolaria.profiler.window import Window
from esper.tolaria.profiler.writer import Trace, TraceWriter
from esper.tolaria.recorder import Recorder

_LOOK_EVERY_S = 0.1
_ON_ALARM = Window(wait=0, warmup=1, active=5)


class Watch:
    """Takes note of each step, and has a profile recorded when there is a reason to.

    Whatever goes wrong is an event and a count; training goes on with the same numbers.

    :param config: when, how long and how many.
    :param run: directory of the run.
    :param worker: writes the traces.
    :param recorder: told of traces, alarms and failures.
    :raises ConfigError: nothing can be written into the directory.
    """

    def __init__(
        self, config: ProfilerConfig, run: Path, worker: AsyncWorker, recorder: Recorder
    ) -> None:
        self.saved = self.failed = 0
        self._max_traces = config.max_traces
        self._recorder = recorder
        self._writer = TraceWriter(run / "profiles", run.name, worker)
        self._session = Session(self._writer, worker, self._conclude)
        self._slow = SlowSteps(
            config.slow_step_factor, config.slow_step_patience, config.slow_step_cooldown
        )
        self._export_ms: float | None = None
        self._wishes: deque[Wish] = deque()
        self._box: RequestBox | None = RequestBox(run)
        self._seen: set[str] = set()
        self._look_at = 0.0
        self._idle = self._profiled = False
        self._open_box(self._box)
        if config.active:
            window = Window(config.wait, config.warmup, config.active, config.repeat)
            self._wishes.append(Wish("scheduled", window))

    def step(self, record: StepRecord) -> None:
        """Take note of a step that has ended; the next one begins."""
        total = sum(record.timings_ms.values())
        if self._idle and total < self._slow.limit_ms and time.monotonic() < self._look_at:
            self._slow.healthy.append(total)
            return
        profiled = self._session.busy
        if profiled:
            self._session.leave()
        elif not self._profiled and self._slow.judge(record.step, total):
            self._raise_alarm(record.step, total)
        # What a profile costs, with the step after it too, says nothing about the steps.
        self._profiled = profiled
        self._look(record.step)
        while self._wishes and not self._session.busy:
            self._begin(self._wishes.popleft())
        self._session.enter(self._recorder.update.progress.step)
        self._idle = not (self._session.busy or self._slow.suspicious)

    def close(self) -> None:
        """End what is being recorded, write it, and answer whoever still waits."""
        self._session.close()
        self._look_at = 0.0
        self._look(self._recorder.update.progress.step)
        while self._wishes:
            self._conclude(self._wishes.popleft(), ProfilerError("the run has ended"))
        if self._box is not None:
            self._box.close()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the profiler by name; what was not measured is absent."""
        metrics = {
            "tolaria.profiler.traces_total": float(self.saved),
            "tolaria.profiler.failed_total": float(self.failed),
            "tolaria.profiler.slow_step_alarms_total": float(self._slow.alarms),
        }
        if self._export_ms is not None:
            metrics["tolaria.profiler.export_ms"] = self._export_ms
        if self._session.overhead_ms is not None:
            metrics["tolaria.profiler.overhead_ms"] = self._session.overhead_ms
        return metrics

    def _raise_alarm(self, step: int, total_ms: float) -> None:
        median_ms = self._slow.median_ms
        self._recorder.event(
            "slow_step",
            f"step {step} took {total_ms:.3g} ms, {total_ms / median_ms:.1f} times the median, and "
            "is not the first in a row; the next steps are profiled",
            Level.WARNING,
            step=step,
            milliseconds=total_ms,
            median_ms=median_ms,
        )
        self._wishes.append(Wish("slow_step", _ON_ALARM))

    def _look(self, step: int) -> None:
        """Now and then: learn what a usual step takes, and see whether somebody asks."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY_S
        self._slow.learn(step)
        if self._box is None:
            return
        try:
            names = self._box.waiting()
        except OSError as error:
            self._give_up_the_box(error)
            return
        for name in names:
            if name not in self._seen:
                self._take(self._box, name)
        self._seen = set(names)
        if self._session.request and self._session.request not in self._seen:
            self._drop()

    def _take(self, box: RequestBox, name: str) -> None:
        try:
            request = box.read(name)
        except RequestError as error:
            self._fail("requested", str(error))
            return
        if request is None:
            return
        if not 1 <= request.steps <= MOST_STEPS:
            reason = f"{request.steps} steps were asked for; ask for 1 to {MOST_STEPS}"
            self._answer(name, Reply(error=reason))
            return
        self._wishes.append(Wish("requested", Window(0, 1, request.steps), name))

    def _drop(self) -> None:
        led_to = self._session.drop()
        if led_to is not None:
            message = f"a profile was asked for and taken back: {led_to}"
            self._recorder.event("profile_dropped", message)

    def _begin(self, wish: Wish) -> None:
        kept = len(list(self._writer.directory.glob(f"*{SUFFIX}")))
        if kept + wish.window.repeat > self._max_traces:
            reason = (
                f"{kept} traces are in {self._writer.directory} and profiler.max_traces is "
                f"{self._max_traces}; raise it, or move some away"
            )
            self._conclude(wish, ProfilerError(reason))
            return
        self._session.begin(wish)

    def _conclude(self, wish: Wish, outcome: Trace | ProfilerError) -> None:
        if isinstance(outcome, ProfilerError):
            self._fail(wish.cause, str(outcome))
            reply = Reply(error=str(outcome))
        else:
            self._note(wish, outcome)
            reply = Reply(str(outcome.path), outcome.steps, outcome.bytes)
        if wish.request:
            self._answer(wish.request, reply)

    def _note(self, wish: Wish, trace: Trace) -> None:
        self.saved += 1
        self._export_ms = trace.milliseconds
        self._recorder.event(
            "profile_saved",
            f"profile of {trace.steps} steps: {trace.path}",
            cause=wish.cause,
            path=str(trace.path),
            steps=trace.steps,
            bytes=trace.bytes,
            export_ms=trace.milliseconds,
        )

    def _fail(self, cause: str, reason: str) -> None:
        self.failed += 1
        message = f"no profile ({cause}): {reason}"
        self._recorder.event("profile_failed", message, Level.WARNING, cause=cause, reason=reason)

    def _answer(self, name: str, reply: Reply) -> None:
        if self._box is None:
            return
        try:
            self._box.answer(name, reply)
        except RequestError as error:
            self._fail("requested", str(error))

    def _open_box(self, box: RequestBox) -> None:
        try:
            box.open()
        except OSError as error:
            self._give_up_the_box(error)

    def _give_up_the_box(self, error: OSError) -> None:
        self._box = None
        self._fail("requested", f"profiles cannot be asked for any more: {error}")


class NoWatch:
    """Takes no note of anything."""

    def step(self, record: StepRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}


def open_watch(
    config: ProfilerConfig, directory: Path | None, worker: AsyncWorker, recorder: Recorder
) -> Watch | NoWatch:
    """Make the profiler of a run.

    :param directory: of the run.
    :raises ConfigError: profiles are scheduled, but there is no directory for them.
    """
    if not config.enabled:
        return NoWatch()
    if directory is None:
        if config.active:
            raise ConfigError(
                f"profiler.active is {config.active}, but this run has no directory for its "
                "traces; give it one, or leave profiler.active at 0"
            )
        return NoWatch()
    try:
        return Watch(config, directory, worker, recorder)
    except ConfigError as error:
        if config.active:
            raise
        # Nobody has asked for a profile yet: no reason not to train.
        message = f"no step of this run can be profiled: {error}"
        recorder.event("profile_failed", message, Level.WARNING, cause="start", reason=str(error))
        return NoWatch()
