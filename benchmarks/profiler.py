"""What the profiler costs: a step while it is idle, a step that is recorded, the end of a window.

Run it from the root: ``OMP_NUM_THREADS=1 python benchmarks/profiler.py``.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from esper.core.config import ProfilerConfig
from esper.core.worker import AsyncWorker
from esper.leyline import StepRecord
from esper.nissa import NullHub
from esper.tolaria.profiler import Profiler, Watch, Window
from esper.tolaria.profiler.recording import preload
from esper.tolaria.recorder import PHASES, Recorder
from esper.tolaria.recovery_log import RecoveryLog
from esper.tolaria.update import Update

IDLE_STEPS = 200_000
ROUNDS = 7


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    preload()
    print(f"first use, once, beside training: {time.perf_counter() - began:.2f} s")
    measure_idle()
    for width, depth, batch in ((64, 20, 8), (512, 8, 64), (1024, 8, 256)):
        for active in (5, 50):
            measure_window(width, depth, batch, active)


def measure_idle() -> None:
    """Print what a run pays for a step in which nothing is recorded."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    recorder = Recorder(NullHub(), Update(optimizer), RecoveryLog())
    record = StepRecord(
        step=1,
        attempt=0,
        epoch=0,
        batch=0,
        time=0.0,
        action="commit",
        loss=0.0,
        losses={},
        learning_rate=0.1,
        timings_ms=dict.fromkeys(PHASES, 1.0),
    )
    with AsyncWorker(preload=()) as worker, tempfile.TemporaryDirectory() as folder:
        watch = Watch(ProfilerConfig(), Path(folder), worker, recorder)
        watch.step(record)
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(IDLE_STEPS):
                watch.step(record)
            times.append((time.perf_counter() - began) / IDLE_STEPS)
    print(f"idle: {min(times) * 1e6:.2f} us a step, looking for requests included")


def measure_window(width: int, depth: int, batch: int, active: int) -> None:
    """Print what recorded steps cost beside plain ones, in turns, and what the end costs."""
    step = make_step(width, depth, batch)
    plain, recorded, ends, exports, size = [], [], [], [], 0
    for _ in range(ROUNDS):
        plain.append(median_ms(step, active))
        with tempfile.TemporaryDirectory() as folder:
            with Profiler(folder, window=Window(0, 1, active)) as profiler:
                step()
                profiler.step()
                times = []
                for _ in range(active):
                    times.append(median_ms(step, 1))
                    began = time.perf_counter()
                    profiler.step()
                ends.append((time.perf_counter() - began) * 1e3)
            recorded.append(statistics.median(times))
            exports.append(profiler.traces[0].milliseconds)
            size = profiler.traces[0].bytes
    cost = min(recorded) - min(plain)
    print(
        f"{depth} layers of {width}, batch {batch}, {active} steps: "
        f"plain {min(plain):.2f} ms, recorded +{cost:.2f} ms ({cost / min(plain):.0%}); end of "
        f"window {min(ends) - min(exports):.1f} ms, export {min(exports):.1f} ms, "
        f"{size / 2**20:.2f} MiB"
    )


def make_step(width: int, depth: int, batch: int) -> Callable[[], None]:
    """Return a training step of a plain network."""
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    inputs = torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step()
    return step


def median_ms(step: Callable[[], None], times: int) -> float:
    """Return the median time of some steps."""
    measured = []
    for _ in range(times):
        began = time.perf_counter()
        step()
        measured.append((time.perf_counter() - began) * 1e3)
    return statistics.median(measured)


if __name__ == "__main__":
    main()
