"""The training loop, top-down: one noun per line, in causal order.

A part that is switched off is a null object, so that nothing here asks whether it is on. The order
of events is the order of this text; there are no callbacks that could change it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from esper.leyline import StepRecord
from esper.tolaria.brake import Brake
from esper.tolaria.data import ResumableLoader
from esper.tolaria.drill import Drill, NoDrill
from esper.tolaria.ending import Ending
from esper.tolaria.epochs import Epochs
from esper.tolaria.growth import Growth, NoGrowth
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.keeper import Keeper
from esper.tolaria.objective import Objective
from esper.tolaria.profiler import NoWatch, Watch
from esper.tolaria.recorder import Recorder
from esper.tolaria.rescue import Rescue
from esper.tolaria.update import Update


@dataclass(frozen=True)
class Run:
    """The parts of one training run. Each works alone; the loop lets them take turns."""

    data: ResumableLoader
    place: Callable[[Any], Any]
    drill: Drill | NoDrill
    objective: Objective
    guard: Guard | NullGuard
    brake: Brake
    growth: Growth | NoGrowth
    update: Update
    recorder: Recorder
    rescue: Rescue
    epochs: Epochs
    keeper: Keeper
    profiler: Watch | NoWatch
    ending: Ending


def steps(run: Run) -> Iterator[StepRecord]:
    """Train, one step for each record that is asked for.

    The verdict falls between backward pass and optimizer step: what is refused there never reaches
    the weights. Times are read after each phase; keeping is told with the step that follows.
    """
    now = time.perf_counter_ns
    keeping = 0
    fetching = now()
    run.update.clear()
    for batch in run.data:
        step = run.update.progress.step
        content = run.drill.apply(batch.epoch, batch.number, run.place(batch.content))
        clock = [fetching - keeping, fetching, now()]
        losses = run.objective.losses(content)
        clock.append(now())
        gradients = run.objective.backward(losses)
        clock.append(now())
        verdict = run.guard.judge(step, gradients.total, gradients.norm, gradients.losses)
        verdict = run.brake.review(step, verdict)
        clock.append(now())
        run.growth.train_seeds(verdict, content)
        run.update.carry_out(verdict, gradients)
        clock.append(now())
        record = run.recorder.record(step, batch, gradients, verdict, clock)
        run.rescue.answer(record, batch, verdict)
        run.brake.settle()
        run.growth.settle()
        run.epochs.close_when_ended()
        run.keeper.keep_when_due(verdict)
        run.profiler.step(record)
        keeping = now() - clock[-1]
        yield record
        if run.ending.asked:
            return
        fetching = now()
