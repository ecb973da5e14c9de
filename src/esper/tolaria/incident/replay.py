"""Goes through an incident again: the same state, the same steps, to the bit, under observation."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.core.config import TolariaConfig
from esper.leyline import COMMIT, Action, CheckpointError, RunError, StateError, Verdict
from esper.tolaria.assembly import Assembly, Surroundings, assemble
from esper.tolaria.data import Batch
from esper.tolaria.incident.batch_file import read_batch, tensors_of
from esper.tolaria.incident.course import environment_of
from esper.tolaria.incident.observer import Finding, Observer
from esper.tolaria.incident.ranges import Baseline, Place, Range, can_measure, range_of, rms_of
from esper.tolaria.incident.record import BatchEntry, CourseStep, Incident, Number, read_incident
from esper.tolaria.job import TrainingJob
from esper.tolaria.objective import Gradients
from esper.tolaria.recovery import KEPT
from esper.tolaria.rollback import CheckpointStore
from esper.tolaria.state import Capture
from esper.tolaria.state.random_state import capture_random, restore_random

# Not needed to take the steps again, and in part not wanted: nobody is to be told of anything.
_LEFT_OUT = KEPT | {"guard", "companions", "trail"}
_DONE = Verdict(Action.SKIP)


@dataclass(frozen=True)
class Difference:
    """A step that came out otherwise than it was recorded.

    :param step: index of the step.
    :param what: the value that differs.
    """

    step: int
    what: str
    recorded: Number | None
    replayed: float | None


@dataclass(frozen=True)
class BatchLook:
    """One part of a batch, and whether it is out of the ordinary by itself.

    :param usual: lowest and highest root mean square of it in the steps before, when known.
    :param unusual: it breaks the trend, or is not finite.
    """

    range: Range
    usual: tuple[float, float] | None
    unusual: bool


@dataclass(frozen=True)
class StepLook:
    """What a step looked like under observation.

    :param step: index of the step whose batch it used.
    :param loss: sum of the task losses.
    :param not_finite: first output or gradient that is not finite.
    :param out_of_trend: first that breaks the trend.
    :param batch: the parts of the batch.
    :param operations: how many operations were looked at.
    """

    step: int
    loss: float
    not_finite: Finding | None
    out_of_trend: Finding | None
    batch: tuple[BatchLook, ...]
    operations: int

    @property
    def first(self) -> Finding | None:
        """What to look at: what is not finite, else what breaks the trend."""
        return self.not_finite or self.out_of_trend


@dataclass
class Replay:
    """What came of going through an incident again.

    :param incident: the record.
    :param offending: the first step that something was found in, else the last of the incident.
    :param baseline_steps: healthy steps before it, which show what is usual.
    :param steps: steps that were taken again.
    :param difference: the first step that came out otherwise; None when all are equal to the bit.
    :param reasons: what is not as it was then, and may be why.
    :param sign: an earlier step, which the guard did not doubt, that something breaks the trend in.
    :param healthy: the offending batch on the healthy state, where that was asked for.
    """

    incident: Incident
    offending: StepLook
    baseline_steps: int
    steps: int
    difference: Difference | None = None
    reasons: list[str] = field(default_factory=list)
    sign: StepLook | None = None
    healthy: StepLook | None = None

    @property
    def exact(self) -> bool:
        """Whether every step came out as it was recorded, to the bit."""
        return self.difference is None

    @property
    def cause(self) -> str:
        """``batch``, ``batch and state``, or empty when it was not asked or nothing was found."""
        found, healthy = self.offending.first, self.healthy
        if healthy is None or found is None:
            return ""
        again = healthy.not_finite if found.kind == "not finite" else healthy.first
        return "batch and state" if again is None else "batch"


def replay(directory: Path, job: TrainingJob, *, from_healthy: bool = False) -> Replay:
    """Take the steps of an incident again.

    The job's model and optimizer are used up for it; random generators and threads are left as they
    were found.

    :param directory: of the incident.
    :param job: built anew, as for the run.
    :param from_healthy: run the offending batch on the healthy state as well.
    :raises RunError: the record or its state is missing or damaged, or the job is another one.
    """
    incident = read_incident(directory)
    with _as_recorded(incident):
        return _Stage(directory, incident, job).play(from_healthy)


class _Stage:
    """A run without anything around it, whose steps are told what to do."""

    def __init__(self, directory: Path, incident: Incident, job: TrainingJob) -> None:
        self._directory = directory
        self._incident = incident
        self._job = job
        self._capture = _read_state(directory, incident)
        self._parts = _assemble(job, incident, self._capture)
        self._baseline = Baseline()
        self._entries = {entry.step: entry for entry in incident.batches}
        self._reasons = _reasons(incident, job)

    def play(self, from_healthy: bool) -> Replay:
        course = self._course()
        self._restore()
        difference, sign, looks = None, None, []
        for step in course:
            look, found = self._take(step)
            looks.append(look)
            difference = difference or found
            if look.first is None:
                continue
            if step.step >= self._incident.suspect:
                break
            sign = sign or look
        result = Replay(self._incident, looks[-1], self._baseline.steps, len(looks), difference)
        result.sign = sign
        if from_healthy:
            result.healthy = self._from_healthy(course[len(looks) - 1])
        result.reasons = self._reasons
        return result

    def _course(self) -> list[CourseStep]:
        incident = self._incident
        first, last = incident.state.step, incident.last_step
        course = [step for step in incident.course if step.step >= first]
        if [step.step for step in course] != list(range(first, last + 1)):
            raise RunError(
                f"{incident.id} does not tell every step from {first} to {last}; it cannot be gone "
                "through again"
            )
        return course

    def _from_healthy(self, step: CourseStep) -> StepLook:
        self._restore()
        look, _ = self._observe(step, self._fetch(step))
        return look

    def _restore(self) -> None:
        try:
            self._parts.state.restore(self._capture, keep=_LEFT_OUT)
        except StateError as error:
            raise RunError(
                f"the state of {self._incident.id} does not fit the job: {error}; a replay needs "
                "the model as it was then, without what an executor has changed since"
            ) from error
        # The batches of the course are asked for by name, whatever is skipped elsewhere.
        self._parts.run.data.skipped.clear()

    def _take(self, step: CourseStep) -> tuple[StepLook, Difference | None]:
        run = self._parts.run
        self._restart(step)
        self._set_rate(step.rate)
        look, gradients = self._observe(step, self._fetch(step))
        norm = gradients.norm
        difference = _differs(step.step, "loss", step.loss, look.loss)
        if difference is None and step.gradient_norm is not None:
            difference = _differs(step.step, "gradient norm", step.gradient_norm, norm)
        verdict = COMMIT if step.action == Action.COMMIT.value else _DONE
        run.update.carry_out(verdict, gradients)
        if run.data.epoch_ended:
            # Validation may draw random numbers, as it did then.
            run.epochs.close_when_ended()
        return look, difference

    def _observe(self, step: CourseStep, batch: Batch) -> tuple[StepLook, Gradients]:
        run, baseline = self._parts.run, self._baseline
        doubtful = step.step >= self._incident.suspect
        content = run.drill.apply(batch.epoch, batch.number, run.place(batch.content))
        named = [(f"batch[{i}]", tensor) for i, tensor in enumerate(tensors_of(content))]
        observer = Observer(self._job.model, baseline, doubtful=doubtful)
        looks = tuple(_look_at(name, tensor, observer.values, baseline) for name, tensor in named)
        run.update.clear()
        with observer.watching(named):
            losses = run.objective.losses(content)
            observer.turn()
            gradients = run.objective.backward(losses)
        grads = [p.grad for p in run.objective.parameters if p.grad is not None]
        sums = (gradients.total, gradients.norm or 0.0)
        spoilt = not all(map(math.isfinite, sums))
        observer.conclude([*losses.values(), *grads], spoilt_besides=spoilt)
        if not doubtful and step.action == Action.COMMIT.value and observer.out_of_trend is None:
            baseline.take_in(observer.values)
        look = StepLook(
            step.step,
            gradients.total,
            observer.not_finite,
            observer.out_of_trend,
            looks,
            observer.operations,
        )
        return look, gradients

    def _fetch(self, step: CourseStep) -> Batch:
        """Return the batch of a step: as the data gives it again, else as it was kept."""
        data = self._parts.run.data
        if data.position != (step.epoch, step.batch):
            data.load_state_dict({"epoch": step.epoch, "index": step.batch, "skipped": []})
        batch = next(data)
        entry = self._entries.get(step.step)
        if entry is None or not entry.file:
            return batch
        kept = read_batch(self._directory, entry)
        if _same(batch, kept, entry):
            return batch
        reason = (
            f"the data gives another batch for step {step.step} than then; the kept one is used"
        )
        if reason not in self._reasons:
            self._reasons.append(reason)
        return batch._replace(content=kept)

    def _restart(self, step: CourseStep) -> None:
        """Where a rollback led to this step: do to the learning rate what the rollback did."""
        restart = self._incident.restarts.get(str(step.attempt))
        if restart is None or restart["step"] != step.step:
            return
        update = self._parts.run.update
        cut = update.progress.rate_cut
        if restart["rate_cut"] != cut:
            update.scale_learning_rate(restart["rate_cut"] / cut)
        update.progress.load_state_dict(restart)

    def _set_rate(self, rate: float | None) -> None:
        """Follow what else was done to the learning rate on the way, by a command for instance."""
        update = self._parts.run.update
        present = update.learning_rate
        if rate is not None and present and rate != present:
            update.scale_learning_rate(rate / present)


def _assemble(job: TrainingJob, incident: Incident, capture: Capture) -> Assembly:
    """Wire a run that keeps nothing, tells nobody and asks nobody."""
    quiet = {
        "telemetry": {"enabled": False},
        "snapshots": {"enabled": False},
        "checkpoints": {"enabled": False},
        "incidents": {"enabled": False},
    }
    config = TolariaConfig.model_validate({**incident.settings, **quiet})
    drill = bool(capture.values["components"].get("drill"))
    alone = replace(job, policy=None, broadcast=None)
    return assemble(alone, config, Surroundings(drill=drill))


def _read_state(directory: Path, incident: Incident) -> Capture:
    state = incident.state
    if not state.path:
        raise RunError(f"{incident.id} has no state to begin from: {state.note}")
    store = CheckpointStore((directory / state.path).resolve())
    try:
        info, capture = store.read_latest(before_step=state.step)
    except CheckpointError as error:
        raise RunError(f"the state of {incident.id} cannot be read: {error}") from error
    if info.step != state.step:
        raise RunError(
            f"the checkpoint of step {state.step} that {incident.id} names is gone; raise "
            "incidents.max_state_megabytes to have the state kept with the incident, or "
            "checkpoints.keep"
        )
    return capture


def _reasons(incident: Incident, job: TrainingJob) -> list[str]:
    """Return what arithmetic depends on and is not as it was."""
    then, now = incident.environment, environment_of(job.model)
    return [
        f"{name} was {getattr(then, name)} and is {getattr(now, name)}"
        for name in then.__struct_fields__
        if getattr(then, name) != getattr(now, name)
    ]


def _look_at(
    name: str, tensor: Tensor, values: list[tuple[Place, float]], baseline: Baseline
) -> BatchLook:
    place: Place = ("batch", name, "", 0, 0)
    found = range_of(tensor, name)
    if not tensor.numel() or not can_measure(tensor):
        return BatchLook(found, None, unusual=False)
    rms = rms_of(tensor)
    values.append((place, rms))
    odd = found.not_finite > 0 and not baseline.often_not_finite(place)
    unusual = odd or baseline.broken_by(place, rms, doubtful=True)
    return BatchLook(found, baseline.usual(place), unusual)


def _differs(step: int, what: str, recorded: Number, replayed: float | None) -> Difference | None:
    then = float(recorded)
    if replayed is None or then == replayed or (math.isnan(then) and math.isnan(replayed)):
        return None
    return Difference(step, what, recorded, replayed)


def _same(batch: Batch, kept: Any, entry: BatchEntry) -> bool:  # noqa: ANN401 - the user's batch
    fresh, saved = tensors_of(batch.content), tensors_of(kept)
    if batch.samples != entry.samples or len(fresh) != len(saved):
        return False
    return all(_equal(a, b) for a, b in zip(fresh, saved, strict=True))


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def _as_recorded(incident: Incident) -> Iterator[None]:
    """Set threads and determinism as they were then, and put everything back afterwards."""
    then = incident.environment
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic, generators = torch.are_deterministic_algorithms_enabled(), capture_random()
    torch.set_num_threads(then.threads)
    torch.set_float32_matmul_precision(then.matmul_precision)
    torch.use_deterministic_algorithms(then.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        restore_random(generators)
