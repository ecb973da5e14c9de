"""Operations and processor time of a training, counted on real steps.

A counted step is slower, so that only some are: the first ones after each change of what a step
does, and every fortieth. The others take over their count, and they the others' time.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch.utils.flop_counter import FlopCounterMode

Taken = TypeVar("Taken")
_FIRST, _EVERY = 3, 40


@dataclass
class _Entry:
    kind: Hashable
    flops: int
    seconds: float
    counted: bool


@dataclass
class Meter:
    """Counts step after step.

    :ivar before: operations that were spent before the first step.
    """

    before: int = 0
    _entries: list[_Entry] = field(default_factory=list)
    _seen: dict[Hashable, int] = field(default_factory=dict)
    _flops: dict[Hashable, int] = field(default_factory=dict)
    _counter: FlopCounterMode | None = None
    _apart_flops: int = 0
    _apart_seconds: float = 0.0

    def step(self, kind: Hashable, take: Callable[[], Taken]) -> Taken:
        """Take a step and count what it costs.

        :param kind: of the step; steps of one kind cost the same.
        :raises StopIteration: there was no step; nothing is counted then.
        """
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        counted = seen <= _FIRST or seen % _EVERY == 0
        self._apart_flops, self._apart_seconds = 0, 0.0
        began = time.process_time()
        if counted:
            with FlopCounterMode(display=False) as self._counter:
                taken = take()
            self._flops[kind] = int(self._counter.get_total_flops()) - self._apart_flops
        else:
            self._counter = None
            taken = take()
        seconds = time.process_time() - began - self._apart_seconds
        self._entries.append(_Entry(kind, self._flops[kind], seconds, counted))
        return taken

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out what happens meanwhile: measuring the score, which each arm does alike."""
        flops = 0 if self._counter is None else int(self._counter.get_total_flops())
        began = time.process_time()
        try:
            yield
        finally:
            self._apart_seconds += time.process_time() - began
            if self._counter is not None:
                self._apart_flops += int(self._counter.get_total_flops()) - flops

    def __len__(self) -> int:
        return len(self._entries)

    def flops(self, steps: int | None = None) -> int:
        """Return the operations of the first so many steps, or of all."""
        return self.before + sum(entry.flops for entry in self._entries[:steps])

    def seconds(self, steps: int | None = None) -> float:
        """Return the processor time of the first so many steps, or of all, without the counting."""
        plain: dict[Hashable, list[float]] = {}
        for entry in self._entries:
            if not entry.counted:
                plain.setdefault(entry.kind, []).append(entry.seconds)
        usual = {kind: statistics.median(times) for kind, times in plain.items()}
        return sum(
            min(entry.seconds, usual.get(entry.kind, entry.seconds))
            if entry.counted
            else entry.seconds
            for entry in self._entries[:steps]
        )
