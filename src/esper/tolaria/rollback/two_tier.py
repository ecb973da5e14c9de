"""Rolling back from memory or from disk, whichever serves, each under its deadline.

The live state is touched in one place only, when a whole and verified state is at hand and the
deadline has not passed; after that it is a copy within memory.
"""

import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from esper.core.latency import LatencyHistogram
from esper.core.worker import AsyncWorker, Isolation, shared_worker
from esper.leyline import (
    CheckpointError,
    DeadlineExceeded,
    EsperError,
    StateError,
    Tier,
    WorkerFull,
)
from esper.tolaria.rollback.checkpoint import CheckpointStore, read_checkpoint
from esper.tolaria.rollback.deadline_signal import SharedDeadlineSignal
from esper.tolaria.rollback.generation import CheckpointInfo
from esper.tolaria.rollback.snapshot import FastRollbackCache
from esper.tolaria.state import Capturable, Capture

_LOOK_EVERY_S = 0.002
_FAMILY = {Tier.MEMORY: "fast", Tier.DISK: "full"}


@dataclass(frozen=True)
class RollbackTiers:
    """Where states to roll back to are kept; either may be absent."""

    memory: FastRollbackCache | None = None
    disk: CheckpointStore | None = None


@dataclass(frozen=True)
class RollbackDeadlines:
    """How long each tier may take, in milliseconds.

    :param fast_ms: from memory.
    :param full_ms: from disk.
    """

    fast_ms: float = 500.0
    full_ms: float = 12_000.0

    def of(self, tier: Tier) -> float:
        """Return the deadline of a tier."""
        return self.fast_ms if tier is Tier.MEMORY else self.full_ms


@dataclass(frozen=True)
class RollbackResult:
    """What a rollback did.

    :param tier: where the state came from; None when the live state is as it was.
    :param step: steps taken in the restored state; -1 without one.
    :param latency_ms: milliseconds from the call to the end.
    :param deadline_exceeded: whether a tier missed its deadline.
    :param error: why a tier did not serve; empty when the first one did.
    """

    tier: Tier | None
    step: int
    latency_ms: float
    deadline_exceeded: bool = False
    error: str = ""


class Read(Protocol):
    """Reads a checkpoint without ever taking longer than it may."""

    def __call__(
        self, store: CheckpointStore, before_step: int, deadline: float
    ) -> tuple[CheckpointInfo, Capture]:
        """Read the newest valid checkpoint of a step or an earlier one.

        :param deadline: on ``time.monotonic``.
        :raises DeadlineExceeded: it does not come in time.
        :raises EsperError: it cannot be read.
        """
        ...


class ProcessReader:
    """Reads in a process that can be killed: a file system may hang for ever.

    :param worker: has the process; that of this program by default.
    """

    def __init__(self, worker: AsyncWorker | None = None) -> None:
        self._worker = worker

    def __call__(
        self, store: CheckpointStore, before_step: int, deadline: float
    ) -> tuple[CheckpointInfo, Capture]:
        """Read; see :class:`Read`."""
        worker = self._worker or shared_worker()
        if worker.closed:
            with AsyncWorker(1, 0.0) as own:
                return _ask(own, store, before_step, deadline)
        return _ask(worker, store, before_step, deadline)


class TwoTierRollback:
    """Rolls a state back, again and again, and measures how that goes.

    :param state: restored in place.
    :param tiers: snapshots and checkpoints.
    :param deadlines: of both tiers.
    :param read: reads checkpoints; by default a process that is killed at the deadline does.
    :param signal: told of deadlines that were exceeded.
    :param keep: names of components that a rollback leaves as they are.
    """

    def __init__(
        self,
        state: Capturable,
        tiers: RollbackTiers,
        *,
        deadlines: RollbackDeadlines | None = None,
        read: Read | None = None,
        signal: SharedDeadlineSignal | None = None,
        keep: Container[str] = (),
    ) -> None:
        self.tiers = tiers
        self.deadlines = deadlines or RollbackDeadlines()
        self.signal = signal or SharedDeadlineSignal()
        self._state = state
        self._read = read or ProcessReader()
        self._keep = keep
        self._counts: Counter[tuple[Tier, str]] = Counter()
        self._latencies = {
            (tier, how): LatencyHistogram() for tier in Tier for how in ("success", "failure")
        }

    def attempt(self, before_step: int, *, first: Tier = Tier.MEMORY) -> RollbackResult:
        """Restore the newest trusted state of ``before_step`` or an earlier step.

        :param first: the tier that is tried first; the other one is tried when it fails.
        """
        began = time.monotonic()
        errors: list[str] = []
        exceeded = False
        second = Tier.DISK if first is Tier.MEMORY else Tier.MEMORY
        for tier in (first, second):
            tier_began = time.monotonic()
            step = -1
            try:
                step = self._take(tier, before_step)
            except DeadlineExceeded as error:
                exceeded = True
                self.signal.trip(str(error), self.deadlines.of(tier))
                self._counts[tier, "deadline_exceeded"] += 1
                errors.append(str(error))
            except EsperError as error:
                errors.append(str(error))
            self._measure(tier, "failure" if step < 0 else "success", tier_began)
            if step >= 0:
                return _result(tier, step, began, exceeded, errors)
        return _result(None, -1, began, exceeded, errors)

    def take_any(self) -> int:
        """Restore the oldest healthy snapshot, however long it takes; the last resort.

        :returns: the steps taken in it; -1 when there is none that fits.
        """
        memory = self.tiers.memory
        if memory is None:
            return -1
        found = (memory.get_nearest(step) for step in memory.steps)
        snapshot = next((candidate for candidate in found if candidate is not None), None)
        if snapshot is None:
            return -1
        try:
            memory.restore(snapshot, self._state, keep=self._keep)
        except StateError:
            return -1
        return snapshot.step

    def metrics(self) -> dict[str, float]:
        """Return counts and latencies of both tiers by name; what was not measured is absent."""
        metrics = {}
        for tier, family in _FAMILY.items():
            for how in ("success", "failure", "deadline_exceeded"):
                name = f"tolaria.rollback.{family}.{how}"
                metrics[f"{name}_total"] = float(self._counts[tier, how])
                latency = self._latencies.get((tier, how))
                p95 = None if latency is None else latency.quantile(0.95)
                if latency is not None and latency.last_s is not None and p95 is not None:
                    metrics[f"{name}_ms"] = latency.last_s * 1e3
                    metrics[f"{name}_p95_ms"] = p95 * 1e3
        return metrics

    def _take(self, tier: Tier, before_step: int) -> int:
        return self._fast(before_step) if tier is Tier.MEMORY else self._full(before_step)

    def _fast(self, before_step: int) -> int:
        memory = self.tiers.memory
        snapshot = memory.get_nearest(before_step) if memory is not None else None
        if memory is None or snapshot is None:
            raise CheckpointError(f"no healthy snapshot of step {before_step} or earlier")
        # A copy that has begun has to be finished: whether there is time is asked before.
        expected_ms = memory.predict_ms(snapshot)
        if expected_ms > self.deadlines.fast_ms:
            raise DeadlineExceeded(
                f"the snapshot of step {snapshot.step} would take {expected_ms:.4g} ms to restore; "
                f"rollback.fast_deadline_ms is {self.deadlines.fast_ms:g}"
            )
        memory.restore(snapshot, self._state, keep=self._keep)
        return snapshot.step

    def _full(self, before_step: int) -> int:
        store = self.tiers.disk
        if store is None:
            raise CheckpointError("no checkpoint directory")
        deadline = time.monotonic() + self.deadlines.full_ms / 1e3
        info, capture = self._read(store, before_step, deadline)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the checkpoint of step {info.step} came after "
                f"rollback.full_deadline_ms = {self.deadlines.full_ms:g}"
            )
        self._state.restore(capture, keep=self._keep)
        if self.tiers.memory is not None:
            self.tiers.memory.discard_after(info.step)
        return info.step

    def _measure(self, tier: Tier, how: str, began: float) -> None:
        self._counts[tier, how] += 1
        self._latencies[tier, how].add(time.monotonic() - began)


def attempt_two_tier_rollback(
    state: Capturable,
    tiers: RollbackTiers,
    *,
    before_step: int,
    first: Tier = Tier.MEMORY,
    deadlines: RollbackDeadlines | None = None,
    signal: SharedDeadlineSignal | None = None,
) -> RollbackResult:
    """Restore the newest trusted state of a step or an earlier one, from memory or from disk.

    It returns at the deadline at the latest. Then no thread, process or file of it is left, and
    the live state is as it was.

    :param state: restored in place.
    :param tiers: snapshots and checkpoints; either may be absent.
    :param before_step: states of later steps are not considered.
    :param first: the tier that is tried first.
    :param deadlines: 500 ms from memory and 12 s from disk by default.
    :param signal: told when a deadline was exceeded, and why.
    """
    rollback = TwoTierRollback(state, tiers, deadlines=deadlines, signal=signal)
    return rollback.attempt(before_step, first=first)


def _ask(
    worker: AsyncWorker, store: CheckpointStore, before_step: int, deadline: float
) -> tuple[CheckpointInfo, Capture]:
    arguments = (read_checkpoint, store.directory, before_step)
    while True:
        seconds = max(0.0, deadline - time.monotonic())
        try:
            return worker.call(
                *arguments, timeout_s=seconds, name="tolaria.rollback", isolation=Isolation.PROCESS
            )
        except WorkerFull as error:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"nobody to read a checkpoint: {error}") from error
            time.sleep(_LOOK_EVERY_S)
        except EsperError:
            raise
        except Exception as error:
            # Whatever is raised out there: a run is not lost because a reader broke.
            raise CheckpointError(f"reading failed: {type(error).__name__}: {error}") from error


def _result(
    tier: Tier | None, step: int, began: float, exceeded: bool, errors: list[str]
) -> RollbackResult:
    latency_ms = (time.monotonic() - began) * 1e3
    return RollbackResult(tier, step, latency_ms, exceeded, "; ".join(errors))
