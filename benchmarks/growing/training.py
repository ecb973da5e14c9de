"""One training of one arm by Esper's engine, with all that is counted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
from torch import nn

from esper.core.config import GrowthConfig, ProfilerConfig, TolariaConfig, TrainConfig
from esper.kasmina import Kasmina
from esper.leyline import DivergenceError, Event, Policy, StepRecord, SystemState
from esper.tolaria import TolariaTrainer, TrainingJob
from growing.meter import Meter
from growing.task import Task, parameters


class Setting(msgspec.Struct, frozen=True):
    """What is tuned.

    :param rate: learning rate at the beginning; it follows half a cosine down to 0.
    :param decay: weight decay of AdamW.
    """

    rate: float
    decay: float


class Run(msgspec.Struct):
    """What one training came to.

    :ivar test: score on the test set.
    :ivar validation: the last score on the validation set, by epoch.
    :ivar parameters: at the end.
    :ivar flops: of all steps, surveys and second passes; measuring the score is left out.
    :ivar seconds: of the processor, alike.
    :ivar to_target: operations and seconds until the validation score of the task was reached.
    :ivar story: what became of seeds, and when.
    """

    test: float
    validation: list[float]
    parameters: int
    flops: int
    seconds: float
    to_target: tuple[int, float] | None = None
    story: list[str] = []


@dataclass
class Notes:
    """A sink: keeps the states of the epochs, and what is told about seeds."""

    states: list[SystemState] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def write(self, record: object) -> None:
        """Take one record."""
        if isinstance(record, SystemState):
            self.states.append(record)
        elif isinstance(record, Event) and record.name in _TOLD:
            self.story.append(f"{record.step}: {record.message}")

    def close(self) -> None:
        """Nothing is left to be done."""


_TOLD = ("seed_changed", "seed_refused", "rolled_back", "policy_trouble")


@dataclass(frozen=True)
class Plan:
    """How one arm is trained.

    :param large: whether it begins with the large model.
    :param policy: grows the model; None for one that stays as it is.
    :param growth: Kasmina's configuration.
    :param model: makes another model than the task's own.
    """

    large: bool = False
    policy: Policy | None = None
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    model: Callable[[], nn.Module] | None = None


def train(task: Task, plan: Plan, setting: Setting, seed: int) -> Run:
    """Train from beginning to end.

    :param setting: rate and weight decay.
    :param seed: of initial weights and the order of the data.
    """
    torch.manual_seed(seed)
    model = (plan.model or (task.large if plan.large else task.small))()
    meter, notes = Meter(), Notes()
    if task.pretrain is not None:
        meter.before = task.pretrain(model, seed)
    job, split = make_job(task, plan, setting, model, meter), task.data()
    config = TolariaConfig(
        train=TrainConfig(epochs=task.epochs, seed=seed, device="cpu", threads=1),
        growth=plan.growth,
        profiler=ProfilerConfig(enabled=False),
    )
    trainer = TolariaTrainer.from_job(job, config=config, sinks=[notes])
    ends: dict[int, int] = {}
    try:
        for record in _metered(trainer.steps(), meter, job, _steps_an_epoch(task)):
            ends[record.step + 1] = len(meter)
    except DivergenceError as error:
        notes.story.append(f"stopped: {error}")
    if isinstance(job.executor, Kasmina):
        job.executor.finish()
    run = Run(
        test=task.evaluate(model, split.test),
        validation=[state.validation["score"] for state in notes.states],
        parameters=parameters(model),
        flops=meter.flops(),
        seconds=meter.seconds(),
        story=notes.story,
    )
    first = next((s for s in notes.states if task.reached(s.validation["score"])), None)
    if first is not None:
        spent = ends[first.step]
        run.to_target = meter.flops(spent), meter.seconds(spent)
    return run


def make_job(
    task: Task, plan: Plan, setting: Setting, model: nn.Module, meter: Meter
) -> TrainingJob:
    """Return what the engine trains: a model with AdamW, half a cosine, and growth where planned.

    :param meter: leaves out what measuring the score costs.
    """
    split = task.data()
    optimizer = torch.optim.AdamW(model.parameters(), setting.rate, weight_decay=setting.decay)
    steps = task.epochs * _steps_an_epoch(task)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def score(model: Any, batch: Any) -> dict[str, float]:
        with meter.apart():
            return task.score(model, batch)

    job = TrainingJob(
        model=model,
        optimizer=optimizer,
        data=split.training,
        loss=task.loss,
        validation=split.validation,
        metrics=score,
        scheduler=scheduler,
        batch_size=task.batch,
        name=task.key,
    )
    if plan.policy is None:
        return job
    kasmina = Kasmina(
        model,
        optimizer,
        slots=task.growth.slots,
        sample=split.validation[: task.batch][0],
        scheduler=scheduler,
        blueprints=[task.growth.blueprint],
    )
    return replace(job, executor=kasmina, policy=plan.policy)


def _metered(
    steps: Iterator[StepRecord], meter: Meter, job: TrainingJob, steps_an_epoch: int
) -> Iterator[StepRecord]:
    """Take the steps one by one; those that end an epoch are a kind of their own."""
    kasmina, batch = job.executor, 0
    while True:
        grown: tuple[Any, ...] = ()
        if isinstance(kasmina, Kasmina):
            grown = kasmina.version, *kasmina.stages.values()
        try:
            record = meter.step((batch == steps_an_epoch - 1, grown), lambda: next(steps))
        except StopIteration:
            return
        batch = (record.batch + 1) % steps_an_epoch
        yield record


def _steps_an_epoch(task: Task) -> int:
    samples = len(task.data().training)  # type: ignore[arg-type]
    return -(-samples // task.batch)
