"""What is written of an incident: one JSON file, with its batches and its state beside it.

A number that is not finite has no place in JSON; it is spelt ``"nan"``, ``"inf"`` or ``"-inf"``.
"""

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from esper.leyline import RunError, StepRecord, Verdict

FORMAT = 1
FOLDER = "incidents"
RECORD = "incident.json"
STATE = "state"
UNRECORDED = "not_recorded.json"
_NAME = re.compile(r"(\d{4,})-step-(\d{6,})")

Number = float | str


class CourseStep(msgspec.Struct, frozen=True):
    """One step from the kept state to the incident's last.

    :param step: index of the step.
    :param attempt: counts rollbacks and resumes, from 0.
    :param epoch: epoch of its batch, from 0.
    :param batch: position of its batch in the epoch.
    :param action: ``commit``, ``skip``, ``rollback`` or ``halt``.
    :param loss: sum of the task losses.
    :param losses: loss by task.
    :param gradient_norm: norm of the combined gradient, when it was computed.
    :param rate: learning rate of the first parameter group before the step; None when unknown.
    :param suspicious: the guard doubted it.
    """

    step: int
    attempt: int
    epoch: int
    batch: int
    action: str
    loss: Number
    losses: dict[str, Number]
    gradient_norm: Number | None
    rate: float | None
    suspicious: bool


class Trigger(msgspec.Struct, frozen=True):
    """One verdict that belongs to the incident.

    :param step: index of the step that it fell at.
    :param action: what was done: ``skip``, ``rollback`` or ``halt``.
    :param reason: one sentence with the values that led to it.
    :param first_suspect: step at which the suspicion began; -1 when the verdict does not say.
    :param before_step: for a rollback, the newest step whose state was trusted; else -1.
    :param tier: for a rollback, the tier that was asked for.
    :param rate_factor: what the learning rate was multiplied by.
    :param signal: the series that it is about.
    :param values: the values that led to it, by name.
    """

    step: int
    action: str
    reason: str
    first_suspect: int
    before_step: int
    tier: str
    rate_factor: float
    signal: str
    values: dict[str, Number]


class BatchEntry(msgspec.Struct, frozen=True):
    """Identity of a batch, and whether its content was kept.

    :param step: step that used it.
    :param epoch: its epoch, from 0.
    :param number: its position in the epoch.
    :param samples: indices into the data set.
    :param tensors: dtype and shape of each tensor, in order.
    :param bytes: size of the tensors.
    :param file: name of the tensor file beside the record; empty when the content was not kept.
    :param note: why it was not kept; empty when it was.
    """

    step: int
    epoch: int
    number: int
    samples: list[int]
    tensors: list[str] = []
    bytes: int = 0
    file: str = ""
    note: str = ""


class StateReference(msgspec.Struct, frozen=True):
    """The healthy state that the steps lead on from.

    :param step: steps taken in it; -1 without one.
    :param path: directory of checkpoints that holds it, relative to the incident's; empty without.
    :param bytes: size of its files.
    :param note: what is to be known about it; empty when nothing is.
    """

    step: int = -1
    path: str = ""
    bytes: int = 0
    note: str = ""


class Environment(msgspec.Struct, frozen=True):
    """What the same arithmetic depends on.

    :param threads: CPU threads of torch.
    :param device: of the model's first parameter.
    :param deterministic: whether torch was told to use deterministic algorithms.
    :param matmul_precision: torch's setting for float32 matrix products.
    """

    esper: str
    torch: str
    python: str
    threads: int
    device: str
    deterministic: bool
    matmul_precision: str


class Followed(msgspec.Struct, frozen=True):
    """What was done about it, and what came of that.

    :param outcome: ``under way``, ``recovered``, ``diverged again``, ``halted`` or ``run ended``.
    :param tier: where a rollback took the state from; empty without one.
    :param restored_step: steps taken in the restored state; -1 without one.
    :param latency_ms: milliseconds that the rollback took.
    :param skipped: (epoch, number) of the batches that were left out afterwards.
    :param learning_rate: rate of the first parameter group afterwards.
    :param steps: committed steps that have followed, at most those that are waited for.
    :param loss_before: median loss of the committed steps before the suspicion.
    :param loss_after: median loss of the committed steps that followed.
    :param note: what went wrong with the remedy.
    """

    outcome: str = "under way"
    tier: str = ""
    restored_step: int = -1
    latency_ms: float = 0.0
    skipped: list[tuple[int, int]] = []
    learning_rate: float | None = None
    steps: int = 0
    loss_before: Number | None = None
    loss_after: Number | None = None
    note: str = ""


class Incident(msgspec.Struct):
    """The content of ``incident.json``.

    :param id: number and step, as the directory is named.
    :param run: name of the run's directory.
    :param job: name of the job.
    :param time: seconds since the Unix epoch.
    :param step: step of the first verdict.
    :param suspect: step at which the suspicion began; the replay looks from there on.
    :param attempt: counts rollbacks and resumes, from 0.
    :param epoch: epoch of the step's batch.
    :param batch: position of the step's batch in the epoch.
    :param triggers: the verdicts, in order; a skipped update may have been the first of several.
    :param course: the steps from the kept state to the last verdict.
    :param restarts: for each attempt that a rollback began: step, rate cut and climbing rate that
        it began with.
    :param batches: the batches that are under suspicion.
    :param guard: state of the guard, with the windows of its statistics.
    :param environment: versions, threads and determinism.
    :param settings: of the engine, by section.
    :param state: the state that the course begins from.
    :param followed: action and outcome.
    :param format: version of the layout.
    """

    id: str
    run: str
    job: str
    time: float
    step: int
    suspect: int
    attempt: int
    epoch: int
    batch: int
    triggers: list[Trigger]
    course: list[CourseStep]
    restarts: dict[str, dict[str, Any]]
    batches: list[BatchEntry]
    guard: dict[str, Any]
    environment: Environment
    settings: dict[str, Any]
    state: StateReference = StateReference()
    followed: Followed = Followed()
    format: int = FORMAT

    @property
    def action(self) -> str:
        """The gravest thing that was done: that of the last verdict."""
        return self.triggers[-1].action

    @property
    def last_step(self) -> int:
        """Step of the last verdict."""
        return self.triggers[-1].step


class Unrecorded(msgspec.Struct):
    """Incidents beyond the limit of a run, which are counted only.

    :param count: how many.
    :param first_step: step of the first of them.
    :param last_step: step of the last of them.
    """

    count: int = 0
    first_step: int = -1
    last_step: int = -1


class _Version(msgspec.Struct):
    format: int


def spell(value: float) -> Number:
    """Return a number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)


def course_step(record: StepRecord, rate: float | None) -> CourseStep:
    """Return what an incident keeps of a step's record."""
    norm = record.gradient_norm
    return CourseStep(
        record.step,
        record.attempt,
        record.epoch,
        record.batch,
        record.action,
        spell(record.loss),
        {task: spell(loss) for task, loss in record.losses.items()},
        None if norm is None else spell(norm),
        rate,
        record.suspicious,
    )


def trigger_of(step: int, verdict: Verdict) -> Trigger:
    """Return what an incident keeps of a verdict."""
    return Trigger(
        step,
        verdict.action.value,
        verdict.reason,
        verdict.first_suspect,
        verdict.before_step,
        verdict.tier.value if verdict.before_step >= 0 else "",
        verdict.rate_factor,
        verdict.signal,
        {name: spell(value) for name, value in verdict.trigger.items()},
    )


def name_incident(number: int, step: int) -> str:
    """Return the name of an incident's directory."""
    return f"{number:04d}-step-{step:06d}"


def number_of(name: str) -> int:
    """Return the number that a directory's name tells; 0 when it is no incident's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def incident_directories(run: Path) -> list[Path]:
    """Return the directories of a run's incidents, oldest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if number_of(p.name)), key=lambda p: p.name)


def find_incident(run: Path, reference: str) -> Path:
    """Return the directory of one incident.

    :param reference: its whole name, or its number.
    :raises RunError: there is none, naming those there are.
    """
    found = incident_directories(run)
    for path in found:
        if reference == path.name or (
            reference.isdigit() and int(reference) == number_of(path.name)
        ):
            return path
    known = ", ".join(path.name for path in found) or "none"
    raise RunError(f"{run.name} has no incident {reference!r}; it has {known}")


def read_incident(directory: Path) -> Incident:
    """Read the record of one incident.

    :raises RunError: it cannot be read, or is of a layout that this version does not know.
    """
    path = directory / RECORD
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_Version).format
        if version != FORMAT:
            raise RunError(f"{path} has format {version}; this Esper reads {FORMAT}")
        return msgspec.json.decode(text, type=Incident)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def read_unrecorded(run: Path) -> Unrecorded:
    """Return what was counted beyond the limit.

    :raises RunError: the file is there and cannot be read.
    """
    path = run / FOLDER / UNRECORDED
    if not path.is_file():
        return Unrecorded()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Unrecorded)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
