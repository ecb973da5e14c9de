"""One training of one arm, in a process of its own.

It is called as ``python -m esper.cli.arm ARM DIRECTORY PARENT``. The directory is that of a run,
with its configuration; the parent is the number of the process that waits for the result. What came
of it is left in the directory as ``result.json``; every epoch is told by a line on standard output.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from esper.cli.errors import guarded
from esper.cli.operations import OperationCounter
from esper.cli.run_directory import EVENTS, read_config
from esper.cli.target import build_job
from esper.cli.train import seed_generators
from esper.core.settings import EsperSettings
from esper.leyline import JobError, RunError, StepRecord, SystemState
from esper.nissa import JsonlSink
from esper.nissa.report.comparison import COMPLETED, GROWN, ArmRun
from esper.tolaria import TolariaTrainer, TrainingJob

RESULT = "result.json"


def main(arguments: list[str]) -> int:
    """Train as the directory says; return the exit code."""
    arm, directory, parent = arguments[0], Path(arguments[1]), int(arguments[2])
    return guarded(lambda: _train(arm, directory, parent), debug=False)


def _train(arm: str, directory: Path, parent: int) -> None:
    """Train to the end and leave the result.

    :param parent: number of the process that asked for it; without it nobody wants the result.
    :raises JobError: an arm of fixed size has an executor.
    :raises RunError: training ended early, or came to values that are not finite.
    """
    settings = EsperSettings(**read_config(directory))
    seed_generators(settings)
    job = build_job(settings.run.target)
    if arm != GROWN and job.executor is not None:
        raise JobError(
            f"{settings.run.target} has an executor; the {arm} arm is of a fixed size: leave it out"
        )
    counter = OperationCounter(job.executor, settings.growth.shadow_every)
    last = _LastEpoch()
    trainer = TolariaTrainer.from_job(
        job,
        config=settings.engine(),
        directory=directory,
        sinks=[JsonlSink(directory / EVENTS), last],
    )
    began = time.perf_counter()
    for _ in _watched(counter.over(trainer.steps()), parent):
        pass
    seconds = time.perf_counter() - began
    if trainer.outcome != COMPLETED or last.state is None:
        raise RunError(f"training ended as {trainer.outcome}")
    run = ArmRun(
        arm=arm,
        seed=settings.train.seed,
        outcome=COMPLETED,
        validation=_finite(last.state.validation),
        parameters=_parameters(job),
        operations=counter.total(),
        seconds=seconds,
    )
    temporary = directory / f"{RESULT}.tmp"
    temporary.write_bytes(msgspec.json.encode(run))
    temporary.replace(directory / RESULT)


class _LastEpoch:
    """A sink: keeps the state of the last epoch, and tells of each."""

    def __init__(self) -> None:
        self.state: SystemState | None = None

    def write(self, record: object) -> None:
        if isinstance(record, SystemState):
            self.state = record
            print(f"epoch {record.epoch + 1}", flush=True)  # noqa: T201 - the parent reads it

    def close(self) -> None:
        """Nothing is held."""


def _watched(steps: Iterator[StepRecord], parent: int) -> Iterator[StepRecord]:
    """Train on as long as somebody waits for the result.

    :raises RunError: the program that wanted it is gone.
    """
    for record in steps:
        if os.getppid() != parent:
            raise RunError("the program that asked for this training has ended")
        yield record


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise RunError(
            f"validation metric {broken[0]} is {metrics[broken[0]]} after the last epoch"
        )
    return metrics


def _parameters(job: TrainingJob) -> int:
    return sum(parameter.numel() for parameter in job.model.parameters())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
