"""How often the guard cries wolf, and how often it misses: recorded healthy runs, made-up bad ones.

    python benchmarks/divergence_rules.py [--epochs 25] [--seeds 3]

Healthy losses are recorded from the built-in job under two optimizers. Bad ones are synthetic: a
falling loss under one of three kinds of noise that rises to 1.6 or 2.5 times within 15 steps. Both
are replayed through the guard as it is, and through the same rules on a linear scale.
"""

import argparse
import dataclasses
import math
import random
import statistics
import sys
from collections.abc import Callable

import torch

from esper.core.config import GuardConfig, SnapshotConfig, TrainConfig
from esper.jobs import digits
from esper.leyline import Action
from esper.tolaria import Guard, TolariaConfig, TolariaTrainer
from esper.tolaria.guard import RobustStatistics

SYNTHETIC_STEPS = 600
PER_NOISE = 24


class LinearStatistics(RobustStatistics):
    """The same statistics with distances on a linear scale."""

    def distance(self, loss: float) -> float:
        ordered = self._sorted
        center = self.median
        distances = sorted(abs(value - center) for value in ordered)
        return (loss - center) / max(distances[len(distances) // 2], 0.01 * abs(center), 1e-30)


def main() -> int:
    options = _options()
    healthy = record_healthy(options.epochs, options.seeds)
    bad = list(make_bad())
    steps = sum(len(losses) for losses in healthy)
    print(f"\n{len(healthy)} healthy runs, {steps:,} steps; {len(bad)} synthetic divergences\n")
    print("| scale | divergences called in healthy runs | caught | called too early | delay |")
    print("|---|---:|---:|---:|---:|")
    for name, make in {"logarithmic (ours)": RobustStatistics, "linear": LinearStatistics}.items():
        alarms = sum(len(called(losses, make)) for losses in healthy)
        firsts = [(start, called(losses, make)[:1]) for start, losses in bad]
        delays = [hit[0] - start for start, hit in firsts if hit and hit[0] >= start]
        early = sum(bool(hit) and hit[0] < start for start, hit in firsts)
        delay = f"{statistics.median(delays):.0f} steps" if delays else "-"
        print(f"| {name} | {alarms} | {len(delays)} of {len(bad)} | {early} | {delay} |")
    return 0


def called(losses: list[float], make: Callable[[int], RobustStatistics]) -> list[int]:
    """Return the steps at which a divergence is called; training is taken to go on after each."""
    config = GuardConfig(max_rollbacks=10**6)
    guard = Guard(config)
    guard.statistics = make(config.window)
    hits = []
    for step, loss in enumerate(losses):
        if guard.judge(step, loss).action is Action.ROLLBACK:
            hits.append(step)
            guard.note_recovered(step)
    return hits


def record_healthy(epochs: int, seeds: int) -> list[list[float]]:
    """Train the built-in job without a guard and return the losses of each run."""
    torch.set_num_threads(1)
    runs = []
    for optimizer in ("sgd", "adamw"):
        for seed in range(seeds):
            torch.manual_seed(seed)
            job = digits.build()
            if optimizer == "adamw":
                adamw = torch.optim.AdamW(job.model.parameters(), lr=2e-3)
                job = dataclasses.replace(job, optimizer=adamw, scheduler=None)
            config = TolariaConfig(
                train=TrainConfig(epochs=epochs, seed=seed, device="cpu"),
                guard=GuardConfig(enabled=False),
                snapshots=SnapshotConfig(enabled=False),
            )
            trainer = TolariaTrainer.from_job(job, config=config)
            runs.append([record.loss for record in trainer.steps()])
            print(f"recorded {optimizer}, seed {seed}: {len(runs[-1])} steps", file=sys.stderr)
    return runs


def make_bad() -> list[tuple[int, list[float]]]:
    """Return the step at which each synthetic run begins to diverge, and its losses."""
    source = random.Random(0)
    noises: list[Callable[[], float]] = [
        lambda: source.gauss(0, 0.03),
        lambda: source.gauss(0, 0.15),
        lambda: 0.06 * _student(source),
    ]
    return [_bad_run(source, noise) for noise in noises for _ in range(PER_NOISE)]


def _bad_run(source: random.Random, noise: Callable[[], float]) -> tuple[int, list[float]]:
    start, height = source.randint(200, 500), source.choice([1.6, 2.5])
    losses, drift = [], 0.0
    for step in range(SYNTHETIC_STEPS):
        drift = 0.5 * drift + noise() * math.sqrt(0.75)
        loss = (1 + 2 * math.exp(-step / 200)) * max(0.05, 1 + drift)
        if step >= start:
            loss *= 1 + (height - 1) * min(1.0, (step - start) / 15)
        losses.append(loss)
    return start, losses


def _student(source: random.Random) -> float:
    """Draw from Student's t with three degrees of freedom: heavy tails."""
    chi = sum(source.gauss(0, 1) ** 2 for _ in range(3)) / 3
    return source.gauss(0, 1) / math.sqrt(chi)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=25, help="epochs of each recorded run")
    parser.add_argument("--seeds", type=int, default=3, help="recorded runs of each optimizer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
