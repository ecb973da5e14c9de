"""What a policy that hangs on every call costs a training run: the same job with and without one.

Runs are interleaved in one process. The weights at the end are compared, too: they are the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from calls import policies
from esper.core.config import PolicyConfig, TolariaConfig, TrainConfig
from esper.core.worker import make_worker
from esper.jobs.digits import build
from esper.leyline import Policy
from esper.tolaria import TolariaTrainer

POLICIES: dict[str, type[Policy] | None] = {
    "no policy": None,
    "one that spins, in a process": policies.Spins,
    "one that awaits for ever": policies.Awaits,
    "one that swallows its cancellation": policies.Swallows,
    "one that sleeps, on a thread": policies.Sleeps,
}


def train(policy: type[Policy] | None, epochs: int) -> tuple[float, list[torch.Tensor]]:
    """Return the seconds from the first step to the last, and the weights."""
    torch.manual_seed(0)
    job = build()
    if policy is not None:
        object.__setattr__(job, "policy", policy())
    config = TolariaConfig(
        train=TrainConfig(epochs=epochs, device="cpu"), policy=PolicyConfig(deadline_ms=200)
    )
    worker = make_worker(config.worker)
    trainer = TolariaTrainer.from_job(job, config=config, worker=worker)
    steps = trainer.steps()
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    seconds = time.perf_counter() - began
    worker.shutdown(0.0)
    return seconds, [parameter.detach() for parameter in job.model.parameters()]


def main() -> None:
    """Print one line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(options.rounds):
        for name, policy in POLICIES.items():
            seconds, weights = train(policy, options.epochs)
            times[name].append(seconds)
            if policy is None:
                expected = weights
            elif not all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True)):
                raise SystemExit(f"{name}: the weights are not those of a run without a policy")
    base = statistics.median(times["no policy"])
    print(f"digits, {options.epochs} epochs, deadline 200 ms, median of {options.rounds} runs")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = [s / b - 1 for s, b in zip(seconds, times["no policy"], strict=True)]
        print(
            f"  {name:<36} {median:6.2f} s  {(median / base - 1) * 100:+5.1f} %"
            f"  (paired: {statistics.median(ratios) * 100:+.1f} %)"
        )


if __name__ == "__main__":
    main()
