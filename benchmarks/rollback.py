"""Both rollback tiers beside other ways to keep a training state, and beside what is possible.

    python benchmarks/rollback.py [--sizes MB ...] [--rounds N] [--only memory|disk|stall]

A network of linear and norm layers with AdamW is snapshotted, saved and restored. The floors are a
memcpy, a raw write with fsync, and a raw read of as many bytes. All in one process, every round has
each way once, in any order; ratios are taken within a round, and are given as their median.
Files go to a temporary directory below the current one, or below ``--directory``.
"""

import argparse
import gc
import os
import platform
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiers.disk import disk_tier
from tiers.memory import memory_tier
from tiers.stall import stalls
from tiers.workload import Training

PARTS = ("memory", "disk", "stall")


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    # One process is what is asked for, with no_dist, and what is warned of then.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    print(machine())
    options.directory.mkdir(parents=True, exist_ok=True)
    for megabytes in options.sizes:
        training = Training(megabytes)
        if "memory" in options.only:
            memory_tier(training, options.rounds)
        gc.collect()
        with tempfile.TemporaryDirectory(prefix="rollback-", dir=options.directory) as folder:
            if "disk" in options.only:
                disk_tier(training, options.rounds, Path(folder))
            gc.collect()
            if "stall" in options.only:
                stalls(training, options.rounds, Path(folder))
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")
    return 0


def machine() -> str:
    """Return what it was measured on and with."""
    versions = ", ".join(
        f"{name} {found}" for name in ("esper", "torch", "safetensors") if (found := _version(name))
    )
    load = os.getloadavg()[0]
    python = platform.python_version()
    return f"{os.cpu_count()} cores, load {load:.1f} at the start; Python {python}, {versions}."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        print(f"{package} is not installed and left out; the bench extra has it.")
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=float, nargs="+", default=[100, 500, 1500], metavar="MB")
    parser.add_argument("--rounds", type=int, default=5, help="of each size")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which tables")
    parser.add_argument("--directory", type=Path, default=Path(), help="where files go meanwhile")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.sizes) <= 0:
        parser.error("there has to be a round at least, and sizes are megabytes above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
