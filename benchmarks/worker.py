"""Calls under deadlines, beside other ways to make them: round trips, overruns, what is left.

    python benchmarks/worker.py [tables] [--quick] [--rounds N] [--timeouts N]

``tables``: round-trips, submissions, overruns, closing, tensors, training, leftovers; all of them
by default. Esper's worker stands beside an event loop on a thread (the baseline), executors,
anyio's portal, pebble and torch.multiprocessing. All in one process, every round has each way once,
in turning order; medians. Whether a function still runs is seen by what it signed in to.
"""

import argparse
import ctypes
import gc
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from calls.closing import closings
from calls.heavy import tensors, training
from calls.late import overruns
from calls.leftovers import leftovers
from calls.peers import missing, pebble
from calls.short import round_trips, submissions
from esper.core import AsyncWorker

TABLES = (
    "round-trips",
    "submissions",
    "overruns",
    "closing",
    "tensors",
    "training",
    "leftovers",
)


def main() -> int:
    options = _options()
    quick, rounds = options.quick, 5 if options.quick else options.rounds
    print(machine())
    for line in missing():
        print(line)
    _settle()
    with AsyncWorker(8) as worker:
        if "round-trips" in options.tables:
            round_trips(worker, rounds)
        if "submissions" in options.tables:
            submissions(worker, rounds)
        if "overruns" in options.tables:
            overruns(worker, max(2, rounds // 20))
        if "tensors" in options.tables:
            tensors(worker, max(2, rounds // 15))
        if "training" in options.tables:
            training(worker, 2 if quick else 12, 0.1 if quick else 0.5)
    if "closing" in options.tables:
        closings(2 if quick else 9)
    if "leftovers" in options.tables:
        leftovers(min(options.timeouts, 80) if quick else options.timeouts, 0.5 if quick else 8.0)
    return 0


def machine() -> str:
    """Return what it was measured on and with."""
    packages = ["torch", "anyio", *(["pebble"] if pebble is not None else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = os.getloadavg()[0]
    python = platform.python_version()
    return f"{os.cpu_count()} cores, load {load:.1f} at the start; Python {python}, {versions}."


def _settle() -> None:
    """Keep what is not measured from coming between."""
    torch.set_num_threads(1)
    # What importing made is never garbage; looking for it takes longer than a call.
    gc.collect()
    gc.freeze()
    # glibc would otherwise give memory back and fetch it again between rounds.
    ctypes.CDLL(None).mallopt(-1, 1 << 30)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", nargs="*", default=TABLES, metavar="table", help="which ones")
    parser.add_argument("--rounds", type=int, default=600, help="of the shortest calls")
    parser.add_argument("--timeouts", type=int, default=100_000, help="missed deadlines to count")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    options = parser.parse_args()
    unknown = sorted(set(options.tables) - set(TABLES))
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; known are {', '.join(TABLES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
