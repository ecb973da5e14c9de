"""Finding a size: one run that grows, beside a sweep of fixed sizes."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

from growing.arms import ARMS
from growing.figures import interval, paired, signed, spread, table, verdict
from growing.task import Task, parameters
from growing.training import Plan, Run, Setting, train

GROWING = ("grown at a fixed period", "grown by rules", "grown by rules, inserted")
_TOLERANCE = 0.01


def search(task: Task, seeds: Sequence[int], epochs: int | None = None) -> str:
    """Return the table of what finding a size costs, and the score that it ends with.

    The sweep trains every size and takes the smallest one whose validation score is within the
    tolerance of the best. A growing run is taken as it ends.

    :param seeds: of the runs; one sweep and one growing run of each kind for each.
    :param epochs: shorter runs, to see that everything works.
    """
    task = task if epochs is None else replace(task, epochs=epochs)
    setting = Setting(task.rates[-1], task.decays[-1])
    sweeps = [_sweep(task, setting, seed) for seed in seeds]
    chosen = [_choose(task, runs) for runs in sweeps]
    spent = [(sum(r.flops for r in runs), sum(r.seconds for r in runs)) for runs in sweeps]
    scale, digits = (1.0, 3) if task.bits else (100.0, 1)
    base = [scale * run.test for run in chosen]
    name = f"sweep of {', '.join(name for name, _ in task.sizes)}"
    rows = [_row(name, base, None, chosen, spent, digits)]
    for arm in GROWING:
        runs = [ARMS[arm](task, setting, seed) for seed in seeds]
        print(f"{task.key}: {arm} has been run", file=sys.stderr, flush=True)
        tests = [scale * run.test for run in runs]
        difference = paired(tests, base)
        shown = verdict(*difference, less_is_better=task.bits, unclear="no difference shown")
        said = f"{signed(*difference, digits)}, {shown}"
        costs = [(run.flops, run.seconds) for run in runs]
        row = _row(arm, tests, said, runs, costs, digits)
        parts = [c[0] / s[0] for c, s in zip(costs, spent, strict=True)]
        times = [c[1] / s[1] for c, s in zip(costs, spent, strict=True)]
        row[4] += f" ({statistics.mean(parts):.0%})"
        row[5] += f" ({statistics.mean(times):.0%})"
        rows.append(row)
    unit = "bits a character" if task.bits else "accuracy, %"
    head = [task.title, f"test {unit}", "to the sweep", "parameters", "GFLOP, all", "CPU s, all"]
    return table(head, rows)


def _sweep(task: Task, setting: Setting, seed: int) -> list[Run]:
    return [train(task, Plan(model=make), setting, seed) for _, make in task.sizes]


def _choose(task: Task, runs: Sequence[Run]) -> Run:
    """Return the first run, smallest size first, that is almost as good as the best."""
    scores = [run.validation[-1] for run in runs]
    best = min(scores) if task.bits else max(scores)
    tolerance = _TOLERANCE * (best if task.bits else 1.0)
    near = (run for run in runs if abs(run.validation[-1] - best) <= tolerance)
    return next(near)


def _row(
    name: str,
    tests: list[float],
    said: str | None,
    runs: Sequence[Run],
    costs: Sequence[tuple[int, float]],
    digits: int,
) -> list[str]:
    return [
        name,
        spread(*interval(tests), digits),
        said or "",
        f"{statistics.mean(run.parameters for run in runs):,.0f}",
        f"{statistics.mean(flops for flops, _ in costs) / 1e9:.2f}",
        f"{statistics.mean(seconds for _, seconds in costs):.1f}",
    ]


def sizes(task: Task) -> str:
    """Return the sizes of a sweep, with their parameters."""
    return ", ".join(f"{name}: {parameters(make()):,}" for name, make in task.sizes)
