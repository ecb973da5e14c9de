"""The trainer: owns one run, starts it, ends it, and says what became of it."""

import atexit
import inspect
import platform
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from esper._version import __version__
from esper.core.config import TolariaConfig
from esper.core.worker import AsyncWorker
from esper.leyline import (
    CheckpointError,
    DivergenceError,
    Executor,
    Level,
    Policy,
    Sink,
    StepRecord,
    SystemState,
)
from esper.tolaria.assembly import Assembly, Surroundings, assemble
from esper.tolaria.emergency import EmergencyController
from esper.tolaria.ending import Outcome
from esper.tolaria.job import LossFunction, TrainingJob
from esper.tolaria.loop import steps
from esper.tolaria.metrics import collect_metrics
from esper.tolaria.state import TrainState
from esper.tolaria.tiers import warn_of_slow_restore

# At the end of a run, for emergencies that nobody has been told of yet.
_TELLING_S = 2.0
_under_way: "weakref.WeakSet[Generator[StepRecord, None, None]]" = weakref.WeakSet()


@atexit.register
def _close_what_is_under_way() -> None:
    """Save and end the runs whose owner just stopped asking for steps.

    Left to the interpreter that would happen when half of it, and of torch, is gone.
    """
    for training in list(_under_way):
        if inspect.getgeneratorstate(training) != inspect.GEN_RUNNING:
            training.close()


class TolariaTrainer:
    """Trains a model, guards it against divergence, and can resume to the bit.

    :param model: any module.
    :param optimizer: over its parameters.
    :param data: training data; see :class:`~esper.tolaria.job.TrainingJob`, which holds the less
        common parts and is what :meth:`from_job` takes.
    :param loss_fn: called with model and batch; returns one loss, or one for each task.
    :param tamiyo: policy that is asked how training should adapt.
    :param kasmina: executor of commands that change the model.
    :param config: everything else.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: Dataset[Any] | DataLoader[Any],
        loss_fn: LossFunction,
        *,
        tamiyo: Policy | None = None,
        kasmina: Executor | None = None,
        config: TolariaConfig | None = None,
    ) -> None:
        job = TrainingJob(
            model=model,
            optimizer=optimizer,
            data=data,
            loss=loss_fn,
            policy=tamiyo,
            executor=kasmina,
        )
        self._set_up(job, config or TolariaConfig(), Surroundings())

    @classmethod
    def from_job(
        cls,
        job: TrainingJob,
        *,
        config: TolariaConfig | None = None,
        directory: Path | None = None,
        sinks: Sequence[Sink] = (),
        drill: bool = False,
        worker: AsyncWorker | None = None,
    ) -> "TolariaTrainer":
        """Make a trainer of a whole job.

        :param directory: run directory; without one there are no durable checkpoints.
        :param sinks: receive every step, epoch and event.
        :param drill: inject one divergence, to watch it being taken back.
        :param worker: carries out calls to the outside; the process's own by default.
        """
        trainer = cls.__new__(cls)
        surroundings = Surroundings(directory, sinks, drill, worker)
        trainer._set_up(job, config or TolariaConfig(), surroundings)
        return trainer

    def _set_up(self, job: TrainingJob, config: TolariaConfig, surroundings: Surroundings) -> None:
        self.job = job
        self.config = config
        self._surroundings = surroundings
        self._parts: Assembly = assemble(job, config, surroundings)
        self._resumed_from: int | None = None

    @property
    def state(self) -> TrainState:
        """The training state, for saving it elsewhere."""
        return self._parts.state

    @property
    def emergency(self) -> EmergencyController:
        """The emergency level of this run, to be raised and lowered from any thread."""
        return self._parts.run.brake.controller

    @property
    def outcome(self) -> str:
        """``running``, ``completed``, ``stopped``, ``halted`` or ``failed``."""
        return self._parts.run.ending.outcome.value

    def metrics_snapshot(self) -> dict[str, float]:
        """Return the newest value of every metric that was measured, by name."""
        return collect_metrics(self._parts)

    def resume(self) -> int:
        """Restore the newest valid checkpoint of the run directory.

        :returns: the steps taken in it.
        :raises CheckpointError: there is no directory, or no valid checkpoint in it.
        """
        store = self._parts.rollback.tiers.disk
        if store is None:
            raise CheckpointError(
                "this run keeps no checkpoints; give it a directory and checkpoints.enabled = true"
            )
        info = store.load_latest(self._parts.state)
        self._parts.log.attempt += 1
        self._resumed_from = info.step
        return int(info.step)

    def stop(self) -> None:
        """Finish the current step, write a checkpoint and end."""
        self._parts.run.ending.ask(Outcome.STOPPED, "stopped on request")

    def run(self) -> Iterator[SystemState]:
        """Train to the end; yield the state of each epoch.

        :raises DivergenceError: the guard's remedies are exhausted.
        """
        epochs = self._parts.run.epochs
        for _ in self.steps():
            yield from epochs.take_finished()

    def steps(self) -> Iterator[StepRecord]:
        """Train to the end; yield the record of each step.

        :raises DivergenceError: the guard's remedies are exhausted.
        :raises CheckpointError: another process trains in the same run directory.
        """
        training = self._train()
        _under_way.add(training)
        return training

    def _train(self) -> Generator[StepRecord, None, None]:
        began = time.perf_counter()
        run = self._parts.run
        self._take_directory()
        self._announce()
        self._parts.companions.prepare()
        run.keeper.keep_first()
        warn_of_slow_restore(self._parts.rollback, run.recorder)
        try:
            yield from steps(run)
            if run.update.progress.step == 0:
                run.ending.ask(Outcome.HALTED, "every batch was skipped; nothing was learnt")
            run.ending.ask(Outcome.COMPLETED, "all epochs are done")
        except GeneratorExit:
            run.ending.ask(Outcome.STOPPED, "the caller stopped asking for steps")
            raise
        except BaseException as error:
            run.ending.ask(Outcome.FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._close(time.perf_counter() - began)
        if run.ending.outcome is Outcome.HALTED:
            raise DivergenceError(f"training was halted: {run.ending.reason}")

    def _take_directory(self) -> None:
        """Make sure that no other process trains in the run directory, and that others know."""
        store, recorder = self._parts.rollback.tiers.disk, self._parts.run.recorder
        if store is None:
            return
        try:
            problem = store.open()
        except CheckpointError:
            self._parts.hub.close()
            raise
        if problem:
            recorder.event("checkpoint_trouble", problem, Level.WARNING)

    def _close(self, seconds: float) -> None:
        parts, ending = self._parts, self._parts.run.ending
        if ending.outcome is not Outcome.FAILED:
            parts.run.keeper.keep_last(healthy=ending.outcome is not Outcome.HALTED)
        parts.companions.close()
        parts.run.profiler.close()
        self.emergency.close(_TELLING_S)
        if parts.rollback.tiers.disk is not None:
            parts.rollback.tiers.disk.close()
        parts.run.rescue.incidents.close()
        last = parts.run.epochs.last
        failed = ending.outcome in (Outcome.HALTED, Outcome.FAILED)
        parts.run.recorder.event(
            "run_ended",
            f"{ending.outcome.value} after {parts.run.update.progress.step} steps",
            Level.CRITICAL if failed else Level.INFO,
            outcome=ending.outcome.value,
            seconds=seconds,
            steps=parts.run.update.progress.step,
            validation={} if last is None else last.validation,
            skipped=parts.log.skipped_updates,
            rollbacks=parts.log.rollbacks,
            error=ending.reason if failed else "",
        )
        parts.hub.close()

    def _announce(self) -> None:
        recorder, job, config = self._parts.run.recorder, self.job, self.config
        if self._resumed_from is not None:
            message = f"resumed from the checkpoint of step {self._resumed_from}"
            recorder.event("run_resumed", message, from_step=self._resumed_from)
        plan, validation = self._parts.plan, self._parts.evaluation.plan
        directory = self._surroundings.directory
        parameters = sum(parameter.numel() for parameter in job.model.parameters())
        recorder.event(
            "run_started",
            f"{job.name}: {parameters:,} parameters, {plan.samples:,} samples",
            run=job.name if directory is None else directory.name,
            job=job.name,
            parameters=parameters,
            samples=plan.samples,
            validation_samples=0 if validation is None else validation.samples,
            epochs=config.train.epochs,
            steps_per_epoch=plan.batches,
            device=str(next(job.model.parameters()).device),
            seed=config.train.seed,
            drill=self._surroundings.drill,
            versions={
                "esper": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        )
        warning = self._parts.companions.warning
        if warning:
            recorder.event("policy_unstoppable", warning, Level.WARNING)
