"""Snapshots and going back to them, within memory."""

import copy
import io
import itertools
import resource
from typing import Any

import psutil
import torch

from calls.measures import Arm
from esper.tolaria.rollback import FastRollbackCache
from tiers.figures import Goal, report, times_of
from tiers.workload import Training, memcpy

FLOOR = "memcpy"
GOALS = {
    "Esper, snapshot": [Goal(1.3, FLOOR)],
    "Esper, restore": [Goal(1.3, FLOOR)],
}
SLOTS = 2
STEADY = 20


class Snapshots:
    """Esper's first tier around a state, with every slot taken."""

    def __init__(self, training: Training) -> None:
        self.cache = FastRollbackCache(2**40, max_snapshots=SLOTS)
        self.state = training.state
        self._steps = itertools.count()
        for _ in range(SLOTS):
            self.put()

    def put(self) -> object:
        return self.cache.put(next(self._steps), self.state)

    def restore(self) -> None:
        snapshot = self.cache.get_nearest(self.cache.steps[-1])
        assert snapshot is not None
        self.cache.restore(snapshot, self.state)

    def addresses(self) -> set[int]:
        """Return where the content of the newest snapshot lies."""
        snapshot = self.cache.get_nearest(self.cache.steps[-1])
        assert snapshot is not None
        return {tensor.data_ptr() for tensor in snapshot.capture().tensors.values()}


class Copies:
    """The usual ways to keep a state in memory; what was kept last is what is restored."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._copy: dict[str, Any] = {}
        self._stream = io.BytesIO()

    def deepcopy(self) -> None:
        self._copy = copy.deepcopy(self._training.dicts())

    def load_deepcopy(self) -> None:
        # load_state_dict of an optimizer keeps what it is given: the next step would change it.
        self._training.load(copy.deepcopy(self._copy))

    def save(self) -> None:
        self._stream = io.BytesIO()
        torch.save(self._training.dicts(), self._stream)

    def load_saved(self) -> None:
        self._stream.seek(0)
        self._training.load(torch.load(self._stream, weights_only=True))  # noqa: TID251


def memory_tier(training: Training, rounds: int) -> None:
    """Time snapshots and restores, and look for memory that is allocated on the way."""
    ours, theirs = Snapshots(training), Copies(training)
    arms: dict[str, Arm] = {
        FLOOR: memcpy(training.nbytes),
        "Esper, snapshot": ours.put,
        "Esper, restore": ours.restore,
        "... of both, naming what there is": training.state.capture,
        "deepcopy of the state_dicts": theirs.deepcopy,
        "... restored: deepcopy, load_state_dict": theirs.load_deepcopy,
        "torch.save to BytesIO": theirs.save,
        "... restored: torch.load, load_state_dict": theirs.load_saved,
    }
    times = times_of(arms, rounds, training.nbytes)
    report(f"Memory, {training.describe()}", times, training.nbytes, [FLOOR], GOALS)
    _steady(ours, training.nbytes)


def _steady(ours: Snapshots, nbytes: int) -> None:
    """Print what many snapshots and restores allocate once every slot is taken."""
    process = psutil.Process()
    for what, arm in (("snapshots", ours.put), ("restores", ours.restore)):
        places: set[int] = set()
        for _ in range(SLOTS):
            arm()
            places |= ours.addresses()
        resident, faults = process.memory_info().rss, _faults()
        for _ in range(STEADY):
            arm()
        faults, resident = _faults() - faults, process.memory_info().rss - resident
        share = 100 * faults * resource.getpagesize() / (STEADY * nbytes)
        same = "the same addresses" if ours.addresses() <= places else "OTHER ADDRESSES"
        print(f"\n{STEADY} {what} with every slot taken: resident memory", end=" ")
        print(f"{resident / 2**20:+.2f} MiB; {faults} page faults,", end=" ")
        print(f"for {share:.3f} % of the bytes copied; at {same}.")


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
