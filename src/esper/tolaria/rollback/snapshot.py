"""Tier 1: copies of the training state in memory, in arenas that are allocated once.

Page faults, not copying, are what a snapshot costs: a slot's memory is allocated and touched when
the slot is first used, and written over in place from then on.
"""

import marshal
import threading
import time
from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from esper.leyline import StateError
from esper.tolaria.state.capture import Capturable, Capture

_ALIGNMENT = 64


class _Arena:
    """One block of host memory with a view for each tensor of a capture."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._shapes = [(name, t.shape, t.dtype) for name, t in tensors.items()]
        offsets, size = _layout(tensors)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        if pinned:
            block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            # numpy asks for huge pages, torch does not.
            block = torch.from_numpy(np.empty(max(size, _ALIGNMENT), np.uint8))[:size]
        block.zero_()
        self.nbytes = block.nbytes
        self._pinned = pinned
        self._filled: torch.cuda.Event | None = None
        self.views = {
            name: block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), start in zip(tensors.items(), offsets, strict=True)
        }

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        return self._shapes == [(name, t.shape, t.dtype) for name, t in tensors.items()]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for view, tensor in zip(self.views.values(), tensors.values(), strict=True):
                # From a device, this only enqueues: the step does not wait for the copy, and what
                # changes the tensors next is enqueued behind it.
                view.copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            self._filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._filled.record()

    def wait(self) -> None:
        """Block until what was enqueued has arrived."""
        if self._filled is not None:
            self._filled.synchronize()
            self._filled = None


class Snapshot:
    """The training state as it was after ``step`` steps.

    While it is held, it is neither evicted nor is its memory written over; then it may be read on
    any thread.

    :ivar step: steps taken when it was made.
    :ivar healthy: whether the guard had no doubt then; others are no rollback targets.
    """

    def __init__(self, step: int, *, healthy: bool, arena: _Arena, values: bytes) -> None:
        self.step = step
        self.healthy = healthy
        self._arena = arena
        self._values = values
        self._holders = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether somebody still reads it."""
        return self._holders > 0

    def hold(self) -> "Snapshot":
        """Keep content and memory as they are until :meth:`release`; may be done several times."""
        with self._lock:
            self._holders += 1
        return self

    def release(self) -> None:
        """Let go of it, from any thread.

        :raises RuntimeError: it is not held.
        """
        with self._lock:
            if self._holders == 0:
                raise RuntimeError(f"the snapshot of step {self.step} is released but not held")
            self._holders -= 1

    @property
    def nbytes(self) -> int:
        """Bytes held: the arena and the encoded values."""
        return self._arena.nbytes + len(self._values)

    def capture(self) -> Capture:
        """Return the content. Its tensors are the arena's: they must only be read."""
        self._arena.wait()
        return Capture(self._arena.views, marshal.loads(self._values))


class FastRollbackCache:
    """Keeps the newest snapshots within a budget of bytes and a number of slots.

    The newest healthy snapshot is never evicted, nor is one that is held.

    :param max_megabytes: budget for all snapshots together, in MiB.
    :param max_snapshots: slots, at least 1.
    :raises StateError: at the first :meth:`put` of a state that does not fit the budget.
    """

    def __init__(self, max_megabytes: float, *, max_snapshots: int = 8) -> None:
        self._max_bytes = int(max_megabytes * 2**20)
        self._max_snapshots = max_snapshots
        self._snapshots: dict[int, Snapshot] = {}
        # Taken out while somebody still read them; their memory counts until that has ended.
        self._leaving: list[Snapshot] = []
        self._bytes_per_s = 0.0

    @property
    def size_bytes(self) -> int:
        """Bytes held by all snapshots, exactly."""
        return sum(s.nbytes for s in (*self._snapshots.values(), *self._leaving))

    @property
    def steps(self) -> list[int]:
        """Steps that a snapshot is held of, oldest first."""
        return sorted(self._snapshots)

    def put(self, step: int, state: Capturable, *, healthy: bool = True) -> Snapshot | None:
        """Copy ``state`` into a slot. A snapshot of the same step is replaced.

        :param step: steps taken so far.
        :param healthy: False when the guard doubts the state.
        :returns: None when there is no room: a doubtful state would have had to evict the last
            healthy one, or what would have to make way is held.
        :raises StateError: the state alone is larger than the budget.
        """
        capture = state.capture()
        # Never leaves this process: JSON would take ten times as long.
        values = marshal.dumps(capture.values)
        size = _layout(capture.tensors)[1] + len(values)
        self._require_fit(size)
        free = self._make_room(step, size)
        if not self._has_room(size):
            if not healthy:
                return None
            # The budget holds one state only: the last healthy one makes way for its successor.
            free += self._drop(self.steps)
            if not self._has_room(size):
                return None
        arena = next((arena for arena in free if arena.fits(capture.tensors)), None)
        if arena is None:
            free.clear()
            arena = _Arena(capture.tensors)
        began = time.perf_counter()
        arena.fill(capture.tensors)
        self._bytes_per_s = size / max(time.perf_counter() - began, 1e-9)
        snapshot = Snapshot(step, healthy=healthy, arena=arena, values=values)
        self._snapshots[step] = snapshot
        return snapshot

    def get_nearest(self, step: int) -> Snapshot | None:
        """Return the newest healthy snapshot of ``step`` or an earlier step, if there is one."""
        steps = [kept for kept, s in self._snapshots.items() if s.healthy and kept <= step]
        return self._snapshots[max(steps)] if steps else None

    def predict_ms(self, snapshot: Snapshot) -> float:
        """Return how long restoring a snapshot should take: as long as the last copy, by size."""
        return snapshot.nbytes / self._bytes_per_s * 1e3 if self._bytes_per_s else 0.0

    def restore(self, snapshot: Snapshot, state: Capturable, *, keep: Container[str] = ()) -> None:
        """Put a snapshot back into ``state``; it can be restored again, any number of times.

        Snapshots of later steps are dropped: they belong to a course that is taken back.

        :param keep: names of components that stay as they are.
        :raises StateError: the snapshot does not fit the live state; nothing was changed then.
        """
        state.restore(snapshot.capture(), keep=keep)
        self.discard_after(snapshot.step)

    def discard_after(self, step: int) -> None:
        """Drop every snapshot of a step later than ``step``."""
        self._drop([kept for kept in self._snapshots if kept > step])

    def _require_fit(self, size: int) -> None:
        if size > self._max_bytes:
            raise StateError(
                f"the training state is {size / 2**20:.1f} MiB but snapshots.max_megabytes is "
                f"{self._max_bytes / 2**20:g}; raise it, or set snapshots.enabled = false"
            )

    def _make_room(self, step: int, size: int) -> list[_Arena]:
        """Evict until ``size`` bytes and a slot are free; return the arenas that this freed."""
        freed = [s._arena for s in self._leaving if not s.held]
        self._leaving = [s for s in self._leaving if s.held]
        freed += self._drop([step] if step in self._snapshots else [])
        protected = self.get_nearest(step)
        for candidate in self.steps:
            if self._has_room(size):
                break
            snapshot = self._snapshots[candidate]
            if snapshot is not protected and not snapshot.held:
                freed += self._drop([candidate])
        return freed

    def _drop(self, steps: list[int]) -> list[_Arena]:
        """Take snapshots out; return the arenas that nobody reads any more."""
        dropped = [self._snapshots.pop(step) for step in steps]
        self._leaving += [snapshot for snapshot in dropped if snapshot.held]
        return [snapshot._arena for snapshot in dropped if not snapshot.held]

    def _has_room(self, size: int) -> bool:
        slots = len(self._snapshots) + len(self._leaving) < self._max_snapshots
        return slots and self.size_bytes + size <= self._max_bytes


def _layout(tensors: dict[str, Tensor]) -> tuple[list[int], int]:
    """Return each tensor's offset, aligned to a cache line, and the size of the whole block."""
    offsets = []
    end = 0
    for tensor in tensors.values():
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def snapshot_bytes(state: Capturable) -> int:
    """Return the bytes that one snapshot of ``state`` takes at present, values aside."""
    return _layout(state.capture().tensors)[1]
