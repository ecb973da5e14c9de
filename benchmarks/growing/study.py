"""Every arm of a task, tuned alike, on the same seeds; and the tables of it."""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from growing.arms import ARMS, LARGE, arms_of
from growing.figures import interval, paired, signed, spread, table, verdict
from growing.task import Task
from growing.training import Run, Setting

# Seeds that tuning alone uses.
_TUNING = 1000


class Outcome(msgspec.Struct):
    """What one arm came to.

    :ivar setting: that tuning chose.
    :ivar trials: trainings that took.
    :ivar runs: by reported seed.
    """

    arm: str
    setting: Setting
    trials: int
    runs: list[Run]


class Study(msgspec.Struct):
    """What all arms of a task came to.

    :ivar task: its letter.
    :ivar seeds: of the reported runs.
    """

    task: str
    title: str
    bits: bool
    target: float | None
    seeds: list[int]
    outcomes: list[Outcome]


def study(
    task: Task, seeds: Sequence[int], *, tuning_seeds: int = 1, epochs: int | None = None
) -> Study:
    """Tune each arm, with as many trials as every other, and run it on the reported seeds.

    :param seeds: of the reported runs, the same for each arm.
    :param tuning_seeds: trainings of each trial, on other seeds.
    :param epochs: shorter runs, to see that everything works.
    """
    task = task if epochs is None else replace(task, epochs=epochs)
    outcomes = []
    for name in arms_of(task):
        began = time.monotonic()
        setting, trials = tune(task, name, tuning_seeds)
        runs = [ARMS[name](task, setting, seed) for seed in seeds]
        outcomes.append(Outcome(name, setting, trials, runs))
        mean = statistics.mean(run.test for run in runs)
        told = f"{task.key}: {name}: {mean:.4f}, {setting}, {time.monotonic() - began:.0f} s"
        print(told, file=sys.stderr, flush=True)
    return Study(task.key, task.title, task.bits, task.target, list(seeds), outcomes)


def tune(task: Task, arm: str, seeds: int) -> tuple[Setting, int]:
    """Return the setting with the best validation score at the end, and the trainings it took."""
    scores: dict[Setting, float] = {}
    for rate, decay in itertools.product(task.rates, task.decays):
        setting = Setting(rate, decay)
        runs = [ARMS[arm](task, setting, _TUNING + seed) for seed in range(seeds)]
        scores[setting] = statistics.mean(run.validation[-1] for run in runs)
    best = (min if task.bits else max)(scores, key=lambda setting: scores[setting])
    return best, len(scores) * seeds


def describe(study: Study) -> str:
    """Return the tables of a study, and what they show in words."""
    unit = "bits a character" if study.bits else "accuracy, %"
    head = [
        study.title,
        f"test {unit}",
        "to static, large",
        "",
        "parameters",
        "GFLOP",
        "CPU s",
        "rate, decay",
    ]
    if study.target is not None:
        head[6:6] = [f"GFLOP to {study.target:.0%}", f"CPU s to {study.target:.0%}"]
    large = next(outcome for outcome in study.outcomes if outcome.arm == LARGE)
    rows = [_row(study, outcome, large) for outcome in study.outcomes]
    return table(head, rows)


def _row(study: Study, outcome: Outcome, large: Outcome) -> list[str]:
    scale, digits = (1.0, 3) if study.bits else (100.0, 1)
    tests = [scale * run.test for run in outcome.runs]
    difference = paired(tests, [scale * run.test for run in large.runs])
    compared = ["", ""]
    if outcome.arm != LARGE:
        said = verdict(*difference, less_is_better=study.bits)
        compared = [signed(*difference, digits), said]
    row = [
        outcome.arm,
        spread(*interval(tests), digits),
        *compared,
        f"{statistics.mean(run.parameters for run in outcome.runs):,.0f}",
        f"{statistics.mean(run.flops for run in outcome.runs) / 1e9:.2f}",
        f"{statistics.mean(run.seconds for run in outcome.runs):.1f}",
        f"{outcome.setting.rate:g}, {outcome.setting.decay:g}",
    ]
    if study.target is not None:
        row[6:6] = _to_target(outcome)
    return row


def _to_target(outcome: Outcome) -> list[str]:
    """Return operations and seconds to the target, over the runs that reached it."""
    reached = [run.to_target for run in outcome.runs if run.to_target is not None]
    if not reached:
        return ["never", "never"]
    part = "" if len(reached) == len(outcome.runs) else f" ({len(reached)} of {len(outcome.runs)})"
    flops = statistics.mean(flops for flops, _ in reached) / 1e9
    seconds = statistics.mean(seconds for _, seconds in reached)
    return [f"{flops:.2f}{part}", f"{seconds:.2f}{part}"]
