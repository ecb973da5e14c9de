"""Checkpoints on a disk that fails at any operation, and on one that loses power at any moment."""

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.leyline import CheckpointError
from esper.tolaria.rollback import CheckpointStore
from support.disks import FailingDisk, Recording
from support.states import Stamped

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]
SIZE = 40


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of small states are made in it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


def save(store: CheckpointStore, step: int) -> None:
    state = Stamped(SIZE)
    state.set(step)
    store.save(state, step=step)


def attempt(store: CheckpointStore, step: int) -> CheckpointError | None:
    try:
        save(store, step)
    except CheckpointError as error:
        return error
    return None


def test_whatever_a_crash_leaves_what_was_acknowledged_is_found_whole(place: Path) -> None:
    disk, seed = Recording(place / "live"), random.Random(0)
    (place / "live").mkdir()
    with CheckpointStore(place / "live", keep=1, disk=disk) as store:
        for step in (1, 2, 3, 3):
            save(store, step)
            disk.acknowledge(step)
        store.pin(3)
        store.pin(3, pinned=False)
        # Training goes back to step 2: from here on, either may be found.
        disk.acknowledge(2)
        save(store, 2)
        store.discard_after(2)
        save(store, 4)
        disk.acknowledge(4)
    states = set()
    for cut in range(len(disk.ops) + 1):
        acknowledged = disk.newest_acknowledged(cut)
        for ops in disk.crashes(cut, seed):
            key = tuple((id(op) if op in disk.ops else (op.where, op.data)) for op in ops)
            if (key, acknowledged) in states:
                continue
            states.add((key, acknowledged))
            found = place / f"{len(states)}"
            disk.materialise(ops, found)
            check(found, acknowledged)
            shutil.rmtree(found)
    assert len(states) > 500


def check(directory: Path, acknowledged: int | None) -> None:
    """What was acknowledged, or newer, must load whole; and a run can go on from there."""
    store, state = CheckpointStore(directory, keep=1), Stamped(SIZE)
    try:
        step = store.load_latest(state).step
    except CheckpointError:
        assert acknowledged is None, f"step {acknowledged} was acknowledged and is gone"
    else:
        assert acknowledged is None or step >= acknowledged
        assert state.is_step(step)
    with store:
        save(store, 9)
        assert store.load_latest(state).step == 9
        assert state.is_step(9)
        assert [entry.step for entry in store.history() if entry.event == "saved"][-1] == 9
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    place: Path, error: int, lasting: bool, torn: bool
) -> None:
    failed = 0
    for at in range(200):
        directory = place / f"{at}"
        with CheckpointStore(directory, keep=2) as store:
            save(store, 1)
            save(store, 2)
        disk = FailingDisk(at, error, lasting=lasting, torn=torn)
        acknowledged = 2
        with CheckpointStore(directory, keep=2, disk=disk) as store:
            refused = attempt(store, 3)
        if refused is None:
            acknowledged = 3
        else:
            failed += 1
            assert os.strerror(error) in str(refused)
            assert isinstance(refused.__cause__, OSError)
            # A disk that refuses everything cannot be made to forget what it has: it is whole.
            assert lasting or not list(directory.glob("step-000000003*"))
        state = Stamped(SIZE)
        found = CheckpointStore(directory).load_latest(state).step
        assert found >= acknowledged
        assert state.is_step(found)
        with CheckpointStore(directory, keep=2) as store:
            save(store, 4)
            assert [info.step for info in store.list()] == [4, found]
            assert all(report.valid for report in store.verify())
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
        if disk.count <= at:
            break
    assert disk.count <= at, "every operation of a save has failed once"
    assert at > 20
    assert failed > 10


def test_a_failure_is_written_into_the_history_when_the_disk_permits(place: Path) -> None:
    disk = FailingDisk(7, errno.ENOSPC)
    with CheckpointStore(place, disk=disk) as store, pytest.raises(CheckpointError):
        save(store, 1)
    entries = CheckpointStore(place).history()
    assert [(entry.event, entry.step) for entry in entries] == [("failed", 1)]
    assert "No space left" in entries[0].reason
