import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esper.core.worker import AsyncWorker
from esper.leyline import Tier
from esper.tolaria.rollback import (
    CheckpointStore,
    FastRollbackCache,
    ProcessReader,
    RollbackDeadlines,
    RollbackTiers,
    SharedDeadlineSignal,
    TwoTierRollback,
    attempt_two_tier_rollback,
)
from support.calls import until
from support.states import Stamped

LATE = RollbackDeadlines(fast_ms=500, full_ms=1500)


def kept(directory: Path | None, *steps: int, size: int = 2000) -> tuple[Stamped, RollbackTiers]:
    """A state at step 99, and both tiers with its earlier steps."""
    state, memory = Stamped(size), FastRollbackCache(64)
    disk = None if directory is None else CheckpointStore(directory)
    for step in steps:
        state.set(step)
        memory.put(step, state)
        if disk is not None:
            disk.save(state, step=step)
    if disk is not None:
        disk.close()
    state.set(99)
    return state, RollbackTiers(memory, disk)


def settled(process: psutil.Process) -> tuple[int, int, int]:
    """Threads, files and children, once they have stayed the same for half a second."""
    # A spare process for the next call comes up while the last one is buried.
    deadline, since = time.monotonic() + 10, time.monotonic()
    held = None
    while time.monotonic() - since < 0.5:
        children = len(process.children(recursive=True))
        now = threading.active_count(), process.num_fds(), children
        if now != held:
            held, since = now, time.monotonic()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert held is not None
    return held


@pytest.fixture
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(2, 0.0) as made:
        yield made


def test_memory_serves_when_it_can(tmp_path: Path) -> None:
    state, tiers = kept(tmp_path, 10, 20, 30)
    result = attempt_two_tier_rollback(state, tiers, before_step=25)
    assert (result.tier, result.step, result.error) == (Tier.MEMORY, 20, "")
    assert state.is_step(20)
    assert 0 < result.latency_ms < 500
    assert not result.deadline_exceeded


@pytest.mark.parametrize("first", [Tier.DISK, Tier.MEMORY])
def test_the_disk_serves_first_on_request_or_when_memory_has_none(
    tmp_path: Path, first: Tier
) -> None:
    state, tiers = kept(tmp_path, 10, 20)
    memory = tiers.memory
    assert memory is not None
    if first is Tier.MEMORY:
        memory.discard_after(-1)
    result = attempt_two_tier_rollback(state, tiers, before_step=15, first=first)
    assert (result.tier, result.step) == (Tier.DISK, 10)
    assert state.is_step(10)
    assert all(step <= 10 for step in memory.steps), "they belong to the course taken back"


def test_with_nothing_kept_the_live_state_is_as_it_was() -> None:
    state = Stamped()
    state.set(99)
    result = attempt_two_tier_rollback(state, RollbackTiers(), before_step=5)
    assert (result.tier, result.step) == (None, -1)
    assert "no healthy snapshot" in result.error
    assert "no checkpoint directory" in result.error
    assert state.is_step(99)


def test_a_snapshot_that_cannot_be_copied_in_time_is_left_for_the_disk(tmp_path: Path) -> None:
    state, tiers = kept(tmp_path, 10, size=2_000_000)
    with SharedDeadlineSignal() as signal:
        result = attempt_two_tier_rollback(
            state,
            tiers,
            before_step=10,
            deadlines=RollbackDeadlines(fast_ms=0.001),
            signal=signal,
        )
        trip = signal.read()
    assert (result.tier, result.step) == (Tier.DISK, 10)
    assert result.deadline_exceeded
    assert trip is not None
    assert "rollback.fast_deadline_ms is 0.001" in trip.reason


def test_a_disk_that_never_answers_costs_the_deadline_and_leaves_nothing(
    tmp_path: Path, worker: AsyncWorker
) -> None:
    state, tiers = kept(tmp_path, 10)
    manifest = tmp_path / "step-000000010" / "MANIFEST.json"
    manifest.unlink()
    os.mkfifo(manifest)
    worker.call(os.getpid, timeout_s=20)
    process = psutil.Process()
    with SharedDeadlineSignal(tmp_path / "signal") as signal:
        rollback = TwoTierRollback(
            state,
            RollbackTiers(None, tiers.disk),
            deadlines=LATE,
            read=ProcessReader(worker),
            signal=signal,
        )
        rollback.attempt(10)
        until(lambda: not worker.stats().live)
        before = settled(process)
        began_ns = time.monotonic_ns()
        result = rollback.attempt(10)
        ended_ns = time.monotonic_ns()
        trip = signal.read()
        until(lambda: not worker.stats().live)
        after = settled(process)
    assert all(now <= then for now, then in zip(after, before, strict=True))
    assert (result.tier, result.deadline_exceeded) == (None, True)
    assert LATE.full_ms <= result.latency_ms <= LATE.full_ms * 1.1
    assert state.is_step(99)
    assert state.restored == 0
    assert trip is not None
    assert began_ns < trip.at_ns < ended_ns
    assert (trip.count, trip.deadline_ms) == (2, LATE.full_ms)
    assert "did not end within" in trip.reason
    metrics = rollback.metrics()
    assert metrics["tolaria.rollback.full.deadline_exceeded_total"] == 2
    assert metrics["tolaria.rollback.full.failure_ms"] >= LATE.full_ms
    assert "tolaria.rollback.full.success_ms" not in metrics


def test_a_full_worker_is_waited_for_until_the_deadline(
    tmp_path: Path, worker: AsyncWorker
) -> None:
    state, tiers = kept(tmp_path, 10)
    release = threading.Event()
    handles = [worker.submit(release.wait, timeout_s=20, isolation="thread") for _ in range(2)]
    rollback = TwoTierRollback(
        state,
        RollbackTiers(None, tiers.disk),
        deadlines=RollbackDeadlines(full_ms=300),
        read=ProcessReader(worker),
    )
    result = rollback.attempt(10)
    assert (result.tier, result.deadline_exceeded) == (None, True)
    assert "nobody to read a checkpoint" in result.error
    threading.Timer(0.2, release.set).start()
    rollback.deadlines = RollbackDeadlines()
    assert rollback.attempt(10).tier is Tier.DISK
    assert all(handle.result() for handle in handles)
    assert state.is_step(10)


def test_the_same_snapshot_serves_twice() -> None:
    state, tiers = kept(None, 10)
    rollback = TwoTierRollback(state, tiers)
    for _ in range(2):
        state.set(50)
        assert rollback.attempt(10).step == 10
        assert state.is_step(10)
    assert rollback.metrics()["tolaria.rollback.fast.success_total"] == 2


def test_the_last_resort_takes_whatever_there_is() -> None:
    state, tiers = kept(None, 10, 20)
    rollback = TwoTierRollback(state, tiers)
    assert rollback.attempt(3).tier is None
    assert rollback.take_any() == 10
    assert state.is_step(10)
    assert TwoTierRollback(state, RollbackTiers()).take_any() == -1


def test_the_last_resort_passes_over_a_doubtful_snapshot() -> None:
    state, tiers = kept(None, 20)
    memory = tiers.memory
    assert memory is not None
    state.set(10)
    memory.put(10, state, healthy=False)
    assert TwoTierRollback(state, tiers).take_any() == 20
    assert state.is_step(20)
