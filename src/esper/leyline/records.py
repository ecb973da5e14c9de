"""What a run reports: one record per step, one state per epoch, and events.

Every line of ``events.jsonl`` is one of these, told apart by its ``type`` field. A step is keyed by
``(attempt, step)``: a rollback or a resume starts a new attempt, in which step numbers that were
taken back occur again.
"""

from enum import StrEnum
from typing import Any

import msgspec

from esper.leyline.growth import FieldReport, GrowthState


class Level(StrEnum):
    """How urgent an event is."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class StepRecord(msgspec.Struct, frozen=True, tag_field="type", tag="step", omit_defaults=True):
    """One training step, as it was decided and carried out.

    :param step: index of the step in the run, from 0; state after it is that of ``step + 1`` steps.
    :param attempt: counts rollbacks and resumes, from 0.
    :param epoch: epoch of the batch, from 0.
    :param batch: index of the batch in its epoch, from 0.
    :param time: seconds since the Unix epoch when the step ended.
    :param action: ``commit``, ``skip``, ``rollback`` or ``halt``.
    :param loss: sum of the task losses.
    :param losses: loss by task.
    :param learning_rate: rate of the first parameter group used by this step.
    :param gradient_norm: Euclidean norm of the combined gradient, before clipping; absent when
        neither guard nor clipping needed it.
    :param conflicts: unordered task pairs whose gradients have a negative inner product; absent
        when per-task gradients were not formed.
    :param conflict_rate: ``conflicts / max(1, n - 1)`` for ``n`` tasks.
    :param cosines: cosine of the task gradients by pair, keyed ``"first|second"``.
    :param timings_ms: milliseconds by phase (data, forward, backward, judge, commit, keep).
    :param suspicious: the guard doubts this step.
    :param reason: why the step was not committed.
    """

    step: int
    attempt: int
    epoch: int
    batch: int
    time: float
    action: str
    loss: float
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float | None = None
    conflicts: int | None = None
    conflict_rate: float | None = None
    cosines: dict[str, float] = {}
    timings_ms: dict[str, float] = {}
    suspicious: bool = False
    reason: str = ""


class SystemState(msgspec.Struct, frozen=True, tag_field="type", tag="epoch", omit_defaults=True):
    """The state of training at an epoch boundary. A value that was not measured is absent.

    :param epoch: the epoch that ended, from 0.
    :param step: steps taken so far.
    :param attempt: counts rollbacks and resumes, from 0.
    :param time: seconds since the Unix epoch.
    :param losses: mean training loss by task over the committed steps of the epoch.
    :param validation: metrics on the validation data, by name; empty without validation data.
    :param learning_rate: rate of the first parameter group.
    :param gradient_norm: mean norm of the combined gradient.
    :param conflict_rate: mean of the steps' conflict rates.
    :param conflict_share: mean share of conflicting task pairs, 0 to 1.
    :param skipped: updates refused in this epoch.
    :param rollbacks: rollbacks of the run so far.
    :param samples_per_second: training throughput over the epoch, validation excluded.
    :param timings_ms: mean milliseconds a step by phase.
    :param memory_mb: resident memory of the process, in MiB.
    :param metrics: of the calls to the outside, of conservative mode and of emergencies, by name.
    :param growth: of the model, where there is an executor that grows it.
    :param reports: what became of the newest commands and seeds, oldest first.
    """

    epoch: int
    step: int
    attempt: int
    time: float
    losses: dict[str, float]
    validation: dict[str, float] = {}
    learning_rate: float | None = None
    gradient_norm: float | None = None
    conflict_rate: float | None = None
    conflict_share: float | None = None
    skipped: int = 0
    rollbacks: int = 0
    samples_per_second: float | None = None
    timings_ms: dict[str, float] = {}
    memory_mb: float | None = None
    metrics: dict[str, float] = {}
    growth: GrowthState | None = None
    reports: list[FieldReport] = []


class Event(msgspec.Struct, frozen=True, tag_field="type", tag="event", omit_defaults=True):
    """Something that happened and that a person may want to know.

    :param name: what happened, for instance ``rollback``.
    :param time: seconds since the Unix epoch.
    :param message: one sentence for a person.
    :param step: steps taken when it happened.
    :param attempt: counts rollbacks and resumes, from 0.
    :param level: how urgent it is.
    :param data: the values behind the sentence; JSON types only.
    """

    name: str
    time: float
    message: str
    step: int = 0
    attempt: int = 0
    level: Level = Level.INFO
    data: dict[str, Any] = {}


Record = StepRecord | SystemState | Event
