"""Learning-rate schedules of ``torch.optim`` whose optimizer gains or loses a parameter group.

Each of them computes the next rate of a group as a homogeneous function of that group's present
rate and of the rates kept for it: all of them times a factor give the next rate times the factor.
So a new group keeps its share of the first group's rate for good when every rate kept for it begins
at that share. A floor that holds for all groups alike (``eta_min``) breaks this, and is refused.
So would the smallest reduction that ``ReduceLROnPlateau`` makes, but its ``eps`` of 1e-8 matters
only to rates at which nothing is learnt any more.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from esper.kasmina.surgery.rates import scaled
from esper.leyline import GrowthError

KNOWN: tuple[type[LRScheduler], ...] = (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SWALR,
    SequentialLR,
    StepLR,
)
# Lists with an entry for each group: rates, and what is no rate.
_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHERS = ("base_momentums", "max_momentums", "lr_lambdas")
# What decides the next rates. A subclass that leaves these alone is as good as its base.
_DECIDING = (
    "step",
    "get_lr",
    "_update_lr",
    "_get_closed_form_lr",
    "_reduce_lr",
    "_anneal_func",
    "_get_initial_lr",
)


class Entry(NamedTuple):
    """What one scheduler kept for one group under one name."""

    scheduler: LRScheduler
    name: str
    value: Any


class Schedule:
    """The scheduler that sets an optimizer's rates, with those that it is made of.

    :param optimizer: whose groups are scheduled.
    :param scheduler: None when nothing changes the rates.
    :raises GrowthError: the scheduler, or one that it is made of, is another optimizer's.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self._optimizer = optimizer
        self._schedulers = [] if scheduler is None else list(_unfold(scheduler, set()))
        for part in self._schedulers:
            if part.optimizer is not optimizer:
                raise GrowthError(
                    f"the {_name(part)} sets the rates of another optimizer; pass the scheduler "
                    f"that was built for this {type(optimizer).__name__}"
                )

    def require_known(self) -> None:
        """Refuse a schedule that could go wrong once the number of groups changes.

        :raises GrowthError: a scheduler computes rates in a way of its own, or does not know the
            optimizer's groups.
        """
        groups = len(self._optimizer.param_groups)
        for part in self._schedulers:
            _require_known(part)
            for name in (*_RATES, *_OTHERS):
                known = vars(part).get(name)
                if isinstance(known, list) and len(known) != groups:
                    raise GrowthError(
                        f"the {_name(part)} knows {len(known)} parameter groups ({name}) but the "
                        f"optimizer has {groups}; change groups through the surgeon only"
                    )

    def require_share(self, factor: float) -> None:
        """Refuse a rate that the schedule cannot keep at a share of the first group's.

        :param factor: the new group's rate over the first group's.
        :raises GrowthError: a floor holds for every group alike.
        """
        for part in self._schedulers:
            floor = getattr(part, "eta_min", 0.0)
            if factor != 1.0 and floor != 0.0:
                raise GrowthError(
                    f"the {_name(part)} ends every group at eta_min = {floor:g}, so a new group "
                    f"cannot stay at rate_factor = {factor:g} times the first group's rate; use "
                    "rate_factor = 1, or eta_min = 0"
                )

    def append(self, factor: float) -> None:
        """Schedule a group that was added at the end like the first one.

        :param factor: the new group's rate over the first group's.
        """
        for part, name, values in self._lists():
            first = values[0]
            setattr(part, name, [*values, scaled(first, factor) if name in _RATES else first])

    def remove(self, index: int) -> list[Entry]:
        """Forget the group at ``index``; return what was kept for it."""
        entries = []
        for part, name, values in self._lists():
            entries.append(Entry(part, name, values[index]))
            setattr(part, name, values[:index] + values[index + 1 :])
        return entries

    def insert(self, index: int, entries: list[Entry]) -> None:
        """Put back what :meth:`remove` returned."""
        for part, name, value in entries:
            values = getattr(part, name)
            setattr(part, name, [*values[:index], value, *values[index:]])

    def _lists(self) -> Iterator[tuple[LRScheduler, str, list[Any]]]:
        # New lists are set instead of changing these: two schedulers may share one.
        for part in self._schedulers:
            for name in (*_RATES, *_OTHERS):
                values = vars(part).get(name)
                if isinstance(values, list):
                    yield part, name, values


def _unfold(scheduler: LRScheduler, seen: set[int]) -> Iterator[LRScheduler]:
    if id(scheduler) in seen:
        return
    seen.add(id(scheduler))
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _unfold(part, seen)


def _require_known(scheduler: LRScheduler) -> None:
    kind = type(scheduler)
    base = next((known for known in KNOWN if issubclass(kind, known)), None)
    own = [
        name
        for name in _DECIDING
        if name in vars(scheduler) or getattr(kind, name, None) is not getattr(base, name, None)
    ]
    if base is None or own:
        reason = f"it has its own {own[0]}" if base and own else "it is none of torch.optim's"
        raise GrowthError(
            f"the {_name(scheduler)} cannot be told of added or removed parameter groups: "
            f"{reason}; express the schedule as a LambdaLR, or by a scheduler of torch.optim"
        )


def _name(scheduler: LRScheduler) -> str:
    return f"scheduler {type(scheduler).__name__}"
