"""The steps that led to an incident, as far back as they are remembered."""

import platform
import statistics
from collections import deque
from typing import Any

import torch
from torch import nn

from esper._version import __version__
from esper.core.config import TolariaConfig
from esper.leyline import Action, StepRecord, Verdict
from esper.tolaria.incident.record import CourseStep, Environment, course_step
from esper.tolaria.update import Update

_SHORTEST = 256
_LONGEST = 4096


class Course:
    """Remembers the records of the last steps, and what rollbacks did to the learning rate.

    :param config: how far back a state to begin from may lie.
    :ivar records: takes the record of every step.
    :ivar restarts: for each attempt that a rollback began, the progress that it began with.
    """

    def __init__(self, config: TolariaConfig) -> None:
        self.records: deque[StepRecord] = deque(maxlen=_length(config))
        self.restarts: dict[str, dict[str, Any]] = {}
        self._rates: dict[int, float] = {}

    def note_restart(self, update: Update) -> None:
        """Remember what the attempt begins with that a rollback has just begun."""
        attempt = self.records[-1].attempt + 1
        self.restarts[str(attempt)] = update.progress.state_dict()
        self._rates[attempt] = update.learning_rate

    def suspicion(self, record: StepRecord, verdict: Verdict) -> int:
        """Return the step at which the suspicion began that led to a verdict."""
        if verdict.first_suspect >= 0:
            return verdict.first_suspect
        first = record.step
        for earlier in reversed(self.records):
            if earlier.attempt != record.attempt or not earlier.suspicious:
                break
            first = earlier.step
        return first

    def loss_before(self, suspect: int, count: int) -> float | None:
        """Return the median loss of the last committed steps before one; None without any."""
        losses = [
            step.loss
            for step in self._latest().values()
            if step.step < suspect and step.action == Action.COMMIT.value
        ]
        return statistics.median(losses[-count:]) if losses else None

    def steps_from(self, first: int) -> list[CourseStep]:
        """Return the steps of the present course, from one on."""
        steps, before = [], None
        for step, record in self._latest().items():
            rate = self._rates.get(record.attempt)
            if before is not None and before.attempt == record.attempt:
                rate = before.learning_rate
            before = record
            if step >= first:
                steps.append(course_step(record, rate))
        return steps

    def _latest(self) -> dict[int, StepRecord]:
        """Return the records of the present course by step: what was taken back is left out."""
        last = self.records[-1].step
        latest = {record.step: record for record in self.records if record.step <= last}
        return dict(sorted(latest.items()))


def environment_of(model: nn.Module) -> Environment:
    """Return what arithmetic depends on at present."""
    first = next(iter(model.parameters()), None)
    return Environment(
        esper=__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        device="cpu" if first is None else str(first.device),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        matmul_precision=torch.get_float32_matmul_precision(),
    )


def _length(config: TolariaConfig) -> int:
    between = config.snapshots.every if config.snapshots.enabled else config.checkpoints.every
    wanted = 2 * between + 2 * config.guard.margin + config.guard.window
    return min(max(wanted, _SHORTEST), _LONGEST)
