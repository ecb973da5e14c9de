"""Checkpoints: written so that they survive, and read so that they can be trusted."""

import itertools
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from calls.measures import Arm
from esper.core import AsyncWorker
from esper.leyline import Tier
from esper.tolaria.rollback import (
    CheckpointStore,
    ProcessReader,
    RollbackDeadlines,
    RollbackTiers,
    TwoTierRollback,
)
from tiers.figures import Goal, report, times_of
from tiers.workload import Training

try:
    from safetensors.torch import load_file, save_file
except ImportError:
    save_file = None

WRITE, READ, FRESH = "raw write + fsync", "raw read", "raw read into new memory"
ASIDE, DELETED = "... with fallocate", "... and an older file deleted"
SAVES, LOADS = "Esper, save", "Esper, verified load"
GOALS = {
    SAVES: [Goal(1.2, WRITE)],
    LOADS: [Goal(2.0, READ), Goal(2.0, FRESH)],
}
CHUNK = 16 << 20


class Raw:
    """The floors: as many bytes to a file, and back."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path, self._older = path, path.with_suffix(".older")
        self._content = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        self._buffer = bytearray(CHUNK)

    def write(self, *, set_aside: bool = False) -> None:
        content = memoryview(self._content)
        with self._path.open("wb", buffering=0) as file:
            if set_aside:
                os.posix_fallocate(file.fileno(), 0, len(content))
            for start in range(0, len(content), CHUNK):
                file.write(content[start : start + CHUNK])
            os.fsync(file.fileno())

    def write_and_delete(self) -> None:
        self.write()
        self._older.unlink(missing_ok=True)

    def keep_older(self) -> None:
        """Put the file aside, so that there is one to delete."""
        self._path.rename(self._older)

    def read(self) -> None:
        with self._path.open("rb", buffering=0) as file:
            while file.readinto(self._buffer):
                pass

    def read_new(self) -> object:
        return np.fromfile(self._path, np.uint8)


class Store:
    """Esper's second tier around a state."""

    def __init__(self, directory: Path, training: Training, worker: AsyncWorker) -> None:
        self.store = CheckpointStore(directory, keep=1)
        self._state = training.state
        self._steps = itertools.count(1)
        self._rollback = TwoTierRollback(
            training.state,
            RollbackTiers(disk=self.store),
            deadlines=RollbackDeadlines(full_ms=120_000.0),
            read=ProcessReader(worker),
        )

    def save(self) -> object:
        return self.store.save(self._state, step=next(self._steps))

    def verify(self) -> None:
        assert all(report.valid for report in self.store.verify())

    def read(self) -> object:
        return self.store.read_latest()

    def load(self) -> object:
        return self.store.load_latest(self._state)

    def roll_back(self) -> None:
        result = self._rollback.attempt(2**40, first=Tier.DISK)
        assert result.tier is Tier.DISK, result.error


class Files:
    """Other ways to write a state and to read it; none of them verifies what it reads."""

    def __init__(self, directory: Path, training: Training) -> None:
        self._directory = directory
        self._training = training

    def torch_save(self) -> None:
        with self.path("torch").open("wb") as file:
            torch.save(self._training.dicts(), file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load(self) -> object:
        return torch.load(self.path("torch"), weights_only=True)  # noqa: TID251

    def torch_map(self) -> object:
        found = torch.load(self.path("torch"), weights_only=True, mmap=True)  # noqa: TID251
        moments = found["optimizer"]["state"].values()
        _touch([*found["model"].values(), *(t for state in moments for t in state.values())])
        return found

    def safetensors_save(self) -> None:
        save_file(self._training.state.capture().tensors, self.path("safetensors"))
        with self.path("safetensors").open("rb") as file:
            os.fsync(file.fileno())

    def safetensors_load(self) -> object:
        found = load_file(self.path("safetensors"))
        _touch(found.values())
        return found

    def dcp_save(self) -> None:
        dcp.save(self._training.dicts(), checkpoint_id=self.path("dcp"), no_dist=True)

    def dcp_load(self) -> None:
        dcp.load(self._training.dicts(), checkpoint_id=self.path("dcp"), no_dist=True)

    def path(self, name: str) -> Path:
        return self._directory / f"peer.{name}"

    def remover(self, name: str) -> Callable[[], None]:
        """Return what takes an earlier file of one way away."""
        return lambda: remove(self.path(name))


def _touch(tensors: Iterable[Tensor]) -> None:
    """Have every page there: a file that is only mapped has not been read."""
    for tensor in tensors:
        tensor.view(-1)[:: mmap.PAGESIZE // tensor.element_size()].count_nonzero()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def disk_tier(training: Training, rounds: int, directory: Path) -> None:
    """Time saves and loads, all within the page cache."""
    raw_path = directory / "raw"
    with AsyncWorker(1) as worker:
        raw, ours = Raw(raw_path, training.nbytes), Store(directory / "store", training, worker)
        theirs = Files(directory, training)
        saves = _saves(raw, ours, theirs)
        loads = _loads(raw, ours, theirs)
        before: dict[str, Arm] = {name: lambda: remove(raw_path) for name in (WRITE, ASIDE)}
        before |= {
            DELETED: raw.keep_older,
            "torch.save, fsync": theirs.remover("torch"),
            "safetensors.save_file, fsync": theirs.remover("safetensors"),
            "distributed.checkpoint.save": theirs.remover("dcp"),
        }
        # In one go: whatever else the machine does meets all of them alike.
        times = times_of(saves | loads, rounds, training.nbytes, before=before)
        ours.store.close()
    what, nbytes = training.describe(), training.nbytes
    written: dict[str, Any] = {name: times[name] for name in saves}
    report(f"Saving, {what}", written, nbytes, [WRITE], GOALS)
    read: dict[str, Any] = {name: times[name] for name in loads}
    report(f"Loading from a warm page cache, {what}", read, nbytes, [READ, FRESH], GOALS)


def _saves(raw: Raw, ours: Store, theirs: Files) -> dict[str, Arm]:
    arms: dict[str, Arm] = {
        WRITE: raw.write,
        ASIDE: lambda: raw.write(set_aside=True),
        DELETED: raw.write_and_delete,
        SAVES: ours.save,
        "... of that, reading it back": ours.verify,
        "torch.save, fsync": theirs.torch_save,
        "safetensors.save_file, fsync": theirs.safetensors_save,
        "distributed.checkpoint.save": theirs.dcp_save,
    }
    return _available(arms)


def _loads(raw: Raw, ours: Store, theirs: Files) -> dict[str, Arm]:
    arms: dict[str, Arm] = {
        READ: raw.read,
        FRESH: raw.read_new,
        LOADS: ours.read,
        "... and into the live state": ours.load,
        "... the same in a process that can be killed": ours.roll_back,
        "torch.load, weights_only": theirs.torch_load,
        "torch.load, weights_only, mapped and touched": theirs.torch_map,
        "safetensors.load_file, mapped and touched": theirs.safetensors_load,
        "distributed.checkpoint.load, live state": theirs.dcp_load,
    }
    return _available(arms)


def _available(arms: dict[str, Arm]) -> dict[str, Arm]:
    return {
        name: arm
        for name, arm in arms.items()
        if save_file is not None or "safetensors" not in name
    }
