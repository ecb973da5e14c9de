"""What a trainer's loop costs over a plain PyTorch loop, side by side in one process.

    python benchmarks/loop_overhead.py [--quick] [--check] [--markdown FILE] [--profile ARM]

Every arm trains the same network on the same batches and must end at the same weights. Counted are
Python calls a step, which are the same on every machine; CPU time of the main thread is taken in
pairs with the plain loop and given as the median of the ratios. ``--check`` exits with 1 when Esper
idle is more than 60 calls over plain, or Esper protected above Accelerate.
"""

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))

from loops.counting import per_step, python_calls
from loops.task import Arm, Task, make_task

ARMS = {
    "plain": ("loops.plain", "run", None),
    "Ignite": ("loops.ignite_loop", "run", "pytorch-ignite"),
    "Esper, idle": ("loops.esper_loop", "run_idle", "esper"),
    "Fabric": ("loops.fabric_loop", "run", "lightning"),
    "Esper, protected": ("loops.esper_loop", "run_protected", "esper"),
    "Accelerate": ("loops.accelerate_loop", "run", "accelerate"),
    "Hugging Face Trainer": ("loops.transformers_loop", "run", "transformers"),
    "Lightning": ("loops.lightning_loop", "run", "lightning"),
}
# Past the warm-up of every arm; multiples of ten, so that a snapshot falls alike into each.
SHORT, LONG = 80, 160
TIMED_STEPS = 200
IDLE_LIMIT = 60


@dataclass
class Row:
    """What was measured of one arm."""

    name: str
    calls: float
    c_calls: float
    ratio: float
    microseconds: float
    same_weights: bool


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    arms = _available()
    if options.profile:
        return _show_profile(arms[options.profile])
    rows = measure(arms, pairs=3 if options.quick else options.pairs)
    text = render(rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return _check(rows) if options.check else 0


def measure(arms: dict[str, Arm], *, pairs: int) -> list[Row]:
    expected = _final_weights(arms["plain"])
    rows = []
    for name, arm in arms.items():
        counts = per_step(lambda steps, arm=arm: arm(make_task(steps)), SHORT, LONG)
        ratio, microseconds = _timed(arm, arms["plain"], pairs)
        same = torch.equal(_final_weights(arm), expected)
        rows.append(
            Row(name, python_calls(counts), float(counts["<c>"]), ratio, microseconds, same)
        )
        print(f"measured {name}", file=sys.stderr)
    return rows


def render(rows: list[Row]) -> str:
    plain = rows[0]
    packages = ("esper", "torch", "pytorch-ignite", "lightning", "accelerate", "transformers")
    versions = ", ".join(f"{name} {v}" for name in packages if (v := _version(name)))
    lines = [
        "| loop | Python calls a step | over plain | C calls | CPU time, ratio to plain "
        "| CPU µs over plain | same weights |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.name} | {row.calls:.1f} | {row.calls - plain.calls:+.1f} | {row.c_calls:.1f} "
        f"| {row.ratio:.2f} | {row.microseconds:+.0f} | {'yes' if row.same_weights else 'no'} |"
        for row in rows
    ]
    machine = f"{psutil.cpu_count()} cores, one torch thread; {versions}."
    return "\n".join([*lines, "", machine]) + "\n"


def _timed(arm: Arm, plain: Arm, pairs: int) -> tuple[float, float]:
    """Return the median of the ratios, and of the differences in microseconds a step."""
    ratios, differences = [], []
    for _ in range(pairs):
        ours, base = _cpu_time(arm), _cpu_time(plain)
        ratios.append(ours / base)
        differences.append((ours - base) * 1e6)
    return statistics.median(ratios), statistics.median(differences)


def _cpu_time(arm: Arm) -> float:
    """Return CPU seconds a step on this thread; the time of a short run is taken off."""
    spent = {}
    for steps in (SHORT, SHORT + TIMED_STEPS):
        task = make_task(steps)
        began = time.thread_time_ns()
        arm(task)
        spent[steps] = time.thread_time_ns() - began
    return (spent[SHORT + TIMED_STEPS] - spent[SHORT]) / TIMED_STEPS / 1e9


def _final_weights(arm: Arm) -> torch.Tensor:
    task: Task = make_task(SHORT)
    arm(task)
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def _available() -> dict[str, Arm]:
    arms = {}
    for name, (module, function, package) in ARMS.items():
        if package is not None and _version(package) is None:
            print(f"skipping {name}: {package} is not installed", file=sys.stderr)
            continue
        arms[name] = getattr(importlib.import_module(module), function)
    return arms


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _show_profile(arm: Arm) -> int:
    counts: Counter[str] = per_step(lambda steps: arm(make_task(steps)), SHORT, LONG)
    for name, count in counts.most_common():
        print(f"{count:8.2f}  {name}")
    return 0


def _check(rows: list[Row]) -> int:
    calls = {row.name: row.calls for row in rows}
    problems = []
    if calls["Esper, idle"] > calls["plain"] + IDLE_LIMIT:
        problems.append(f"Esper idle is more than {IDLE_LIMIT} calls over plain")
    if calls["Esper, protected"] >= calls.get("Accelerate", float("inf")):
        problems.append("Esper protected is not below Accelerate")
    problems += [f"{row.name} ended at other weights" for row in rows if not row.same_weights]
    print("\n".join(problems) or "all bounds hold")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three timed pairs only")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of each arm")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound is broken")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--profile", choices=list(ARMS), help="list the calls of one arm's step")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
