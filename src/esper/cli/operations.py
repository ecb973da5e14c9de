"""Counting the floating-point operations of a training, on some of its real steps."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from esper.leyline import Executor, Grower, StepRecord

# A counted step takes longer, so that few are: the first ones after each change of what a step
# does. In the very first one a seed cannot leave out yet what comes before it.
_COUNTED = 3


class OperationCounter:
    """Counts matrix products and convolutions, forwards and backwards.

    Steps of one kind cost the same: between two structural changes, in the same stages. Surveys of
    seeds and structural changes are counted one by one. Validation is left out.

    :param executor: of the job; what it does at the end of an epoch is counted.
    :param shadow_every: a seed that trains in isolation learns at every so many steps.
    """

    def __init__(self, executor: Executor | None, shadow_every: int) -> None:
        self._grower = executor if isinstance(executor, Grower) else None
        self._every = shadow_every
        self._between = 0
        self._kinds: list[Hashable] = []
        self._found: dict[Hashable, int] = {}
        self._tries: dict[Hashable, int] = {}
        if self._grower is not None:
            # The engine asks this very object.
            for name in ("survey", "apply"):
                vars(self._grower)[name] = self._counting(getattr(self._grower, name))

    def over(self, steps: Iterator[StepRecord]) -> Iterator[StepRecord]:
        """Take each step, counted or not, and yield its record."""
        before: StepRecord | None = None
        waiting: tuple[Hashable, int] | None = None
        while True:
            kind = self._kind()
            tries = self._tries[kind] = self._tries.get(kind, 0) + 1
            record, operations = _take(steps, counted=tries <= _COUNTED)
            if record is None:
                return
            # A step that has ended an epoch has validated, too: its count tells nothing.
            if waiting is not None and before is not None and _same_epoch(before, record):
                self._found[waiting[0]] = waiting[1]
            # In one that is not committed no seed learns.
            committed = record.action == "commit"
            waiting = (kind, operations) if committed and operations is not None else None
            self._kinds.append(kind)
            before = record
            yield record

    def total(self) -> float | None:
        """Return the operations of everything; None when no step could be counted."""
        if not self._found:
            return None
        total, known = float(self._between), next(iter(self._found.values()))
        for kind in self._kinds:
            # A kind of step that was not counted lasts a step or two: it costs as the one before.
            known = self._found.get(kind, known)
            total += known
        return total

    def _kind(self) -> Hashable:
        grower = self._grower
        if grower is None:
            return None
        return grower.version, tuple(grower.stages.values()), len(self._kinds) % self._every

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as the function is
            with FlopCounterMode(display=False) as counter:
                found = function(*arguments, **named)
            self._between += counter.get_total_flops()
            return found

        return counted


def _take(steps: Iterator[StepRecord], *, counted: bool) -> tuple[StepRecord | None, int | None]:
    if not counted:
        return next(steps, None), None
    with FlopCounterMode(display=False) as counter:
        record = next(steps, None)
    return record, counter.get_total_flops()


def _same_epoch(before: StepRecord, record: StepRecord) -> bool:
    return (before.epoch, before.attempt) == (record.epoch, record.attempt)
