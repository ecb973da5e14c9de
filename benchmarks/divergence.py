"""When a divergence is called, by Esper and by others, and what that does to the result.

    python benchmarks/divergence.py [--quick] [--seeds 2] [--first-seed 0] [--no-ending]

Real trainings on digits are recorded, healthy ones and ones with a fault; synthetic traces are
added. Every rule sees the same traces. Then the same faults hit runs that go on to their end, with
Esper and without.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from divergence_runs.ending import train
from divergence_runs.faults import FAULTS, Fault
from divergence_runs.recording import HEALTHY, Trace, faulty_runs, healthy_runs, onset_of
from divergence_runs.replay import replay
from divergence_runs.rules import RULES
from divergence_runs.setups import SETUPS, Setup
from divergence_runs.synthetic import synthetic_runs

AFTER, ENDING = 120, 400


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    logging.getLogger("esper.guard").setLevel(logging.ERROR)
    began = time.monotonic()
    setups = SETUPS[:1] if options.quick else SETUPS
    first = options.first_seed
    seeds = range(first, first + (1 if options.quick else options.seeds))
    traces = _record(setups, seeds, 200 if options.quick else options.steps)
    made = list(synthetic_runs(*((2, 2) if options.quick else (24, 24)), seed=first))
    _print_rules("real runs", traces)
    _print_faults(traces)
    _print_rules("synthetic traces", made)
    if not options.no_ending:
        _print_endings(setups, FAULTS[2:3] if options.quick else FAULTS, first)
    print(f"\n{time.monotonic() - began:.0f} s, torch {torch.__version__}", file=sys.stderr)
    return 0


def _record(setups: Sequence[Setup], seeds: Sequence[int], steps: int) -> list[Trace]:
    traces = []
    for runs in (healthy_runs(setups, seeds, steps), faulty_runs(setups, seeds, AFTER)):
        for trace in runs:
            traces.append(trace)
            print(f"recorded {trace.fault}: {trace.name}", file=sys.stderr)
    return traces


def _print_rules(title: str, traces: list[Trace]) -> None:
    scores = {name: replay(traces, make) for name, make in RULES.items()}
    first = next(iter(scores.values()))
    healthy = sum(trace.onset < 0 for trace in traces)
    print(
        f"\n{title}: {healthy} healthy, {first.faults} with a fault, "
        f"{first.healthy_steps:,} healthy steps\n"
    )
    print("| rule | false alarms in 10,000 steps | caught | delay, steps |")
    print("|---|---:|---:|---:|")
    for name, score in scores.items():
        caught = f"{score.caught} of {score.faults}"
        print(f"| {name} | {score.false_alarms_in_10_000:.1f} | {caught} | {score.delay} |")


def _print_faults(traces: list[Trace]) -> None:
    names = [fault.name for fault in FAULTS]
    print("\n| caught of |", " | ".join(names), "|")
    print("|---|" + "---:|" * len(names))
    for name, make in RULES.items():
        scores = [replay([t for t in traces if t.fault == fault], make) for fault in names]
        cells = [f"{score.caught} of {score.faults}" for score in scores]
        print(f"| {name} |", " | ".join(cells), "|")


def _print_endings(setups: Sequence[Setup], faults: Sequence[Fault], seed: int) -> None:
    print("\n| fault | alone | with Esper | what Esper did |")
    print("|---|---:|---:|---|")
    for number, fault in enumerate([HEALTHY, *faults]):
        alone, ours, notes = [], [], []
        for place, setup in enumerate(setups):
            onset = -1 if fault is HEALTHY else onset_of(number, place, seed)
            steps = (400 if fault is HEALTHY else onset) + ENDING
            alone.append(train(setup, fault, seed, onset, steps, protected=False).accuracy)
            ending = train(setup, fault, seed, onset, steps, protected=True)
            ours.append(ending.accuracy)
            notes.append(ending.note)
        print(
            f"| {fault.name} | {statistics.mean(alone):.1%} | {statistics.mean(ours):.1%} | "
            f"{'; '.join(notes)} |",
            flush=True,
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one setup, short runs")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setup and fault")
    parser.add_argument("--first-seed", type=int, default=0, help="others give other runs")
    parser.add_argument("--steps", type=int, default=1200, help="steps of each healthy run")
    parser.add_argument("--no-ending", action="store_true", help="leave the final accuracies out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
