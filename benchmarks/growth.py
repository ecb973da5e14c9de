"""What growing a model costs, what it brings, and what a bad seed can do to it.

    python benchmarks/growth.py tasks [--task A B ...] [--seeds N] [--quick | --long]
    python benchmarks/growth.py cost [--rounds N]
    python benchmarks/growth.py search [--task A B] [--seeds N]
    python benchmarks/growth.py robust

**tasks** trains models of a fixed size, models grown by a plan, by Tamiyo's policies and, where it
can be, by GroMo. Learning rate and weight decay of each are tuned on the validation set, by as many
trials for each and on seeds of their own; reported is the test set, on which nothing is decided.
Operations are counted on real steps, with second passes and surveys. **cost** times steps with a
dormant slot, with a seed that trains in isolation, and with one put in. **search** finds a size by
one run that grows, and by a sweep. **robust** breaks seeds, policies and processes.

Results are kept below benchmarks/__pycache__/growing; ``--from FILE`` prints them again.
"""

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parent))

from growing import rival
from growing.cost import cost
from growing.robust import robust, victim
from growing.search import search, sizes
from growing.signals import CACHE
from growing.study import Study, describe, study
from growing.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    logging.getLogger("esper").setLevel(logging.ERROR)
    if options.source is not None:
        for path in options.source:
            print(describe(msgspec.json.decode(path.read_bytes(), type=Study)), end="\n\n")
        return 0
    if options.part == "victim":
        victim(TASKS["A"], options.folder)
        return 0
    began = time.monotonic()
    print(_machine())
    PARTS[options.part](options)
    print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


def _tasks(options: argparse.Namespace) -> None:
    if "B" in options.task and not rival.installed():
        print("gromo is not installed and left out: pip install --no-deps gromo torchmetrics")
    for key in options.task:
        found = study(
            TASKS[key],
            range(options.seeds),
            tuning_seeds=2 if options.long else 1,
            epochs=options.epochs,
        )
        path = _kept(options.folder, f"tasks-{key}-{options.seeds}-seeds")
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
        print(f"\n**{key}**, {options.seeds} paired seeds, kept in {path.name}\n")
        print(describe(found), flush=True)


def _kept(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def _machine() -> str:
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, one torch thread; "
        f"Python {platform.python_version()}, torch {torch.__version__}."
    )


def _cost(options: argparse.Namespace) -> None:
    print(f"\n{cost(options.rounds)}")


def _search(options: argparse.Namespace) -> None:
    for key in options.task:
        if TASKS[key].sizes:
            print(f"\n**{key}**, sweep of {sizes(TASKS[key])}; {options.seeds} seeds\n")
            print(search(TASKS[key], range(options.seeds), options.epochs), flush=True)


def _robust(options: argparse.Namespace) -> None:
    del options
    print(f"\n{robust(TASKS['A'])}")


PARTS = {"tasks": _tasks, "cost": _cost, "search": _search, "robust": _robust}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ", ".join(PARTS)
    parser.add_argument("part", choices=[*PARTS, "victim"], metavar="PART", help=parts)
    parser.add_argument("--task", nargs="+", choices=sorted(TASKS), help="all by default")
    parser.add_argument("--seeds", type=int, help="paired runs of each arm: 3, or 10 with --long")
    parser.add_argument("--epochs", type=int, help="shorter runs, to see that everything works")
    parser.add_argument("--rounds", type=int, default=40, help="of each way, for cost")
    parser.add_argument("--folder", type=Path, default=CACHE, help="where results are kept")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="3 seeds, one tuning seed; the default")
    form.add_argument("--long", action="store_true", help="10 seeds, two tuning seeds")
    parser.add_argument(
        "--from", dest="source", nargs="+", type=Path, metavar="FILE", help="print kept results"
    )
    options = parser.parse_args(arguments)
    options.task = options.task or sorted(TASKS)
    options.seeds = options.seeds or (10 if options.long else 3)
    if options.rounds < 1 or options.seeds < 1 or (options.epochs or 1) < 1:
        parser.error("rounds, seeds and epochs are 1 at least")
    return options


if __name__ == "__main__":
    sys.exit(main())
