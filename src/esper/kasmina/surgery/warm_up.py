"""A rate that rises for newborn parameters, without the schedule's knowledge.

A unit born with zero outgoing weights gets no gradient through them at first, and a large first
step in a direction that one batch decided. Its group takes a share of its rate instead, which rises
linearly over its first steps. The share is in force during the optimizer's step only.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = "warmup_steps"
LEFT = "warmup_left"


class _Lowered(NamedTuple):
    group: dict[str, Any]
    whole: float | Tensor
    lowered: float | Tensor


class WarmUp:
    """Lowers the rate of groups whose ``warmup_left`` is above zero, while a step is taken.

    A group's ``warmup_steps`` and ``warmup_left`` are plain integers, which the optimizer saves
    with the group. Hooks run in Python: a step replayed from a CUDA graph keeps the share that it
    was captured with, so capture after the warm-up.
    """

    def __init__(self) -> None:
        self._lowered: list[_Lowered] = []

    def begin(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """Lower the rates; called before each step."""
        if self._lowered:
            self.recover()
        for group in optimizer.param_groups:
            if group.get(LEFT, 0) > 0:
                share = (group[STEPS] - group[LEFT] + 1) / group[STEPS]
                self._lowered.append(_lower(group, share))

    def end(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """Put the rates back and count the step; called after each step that did not raise."""
        if not self._lowered:
            return
        lowered, self._lowered = self._lowered, []
        counts = not _found_infinite(optimizer)
        for group, whole, _ in lowered:
            _set_rate(group, whole)
            group[LEFT] -= counts

    def recover(self) -> None:
        """Put back the rates that a step lowered before it raised.

        A rate that was set to something else since then, by a schedule or from a snapshot, stays.
        """
        lowered, self._lowered = self._lowered, []
        for group, whole, low in lowered:
            if torch.equal(torch.as_tensor(group["lr"]), torch.as_tensor(low)):
                _set_rate(group, whole)


def attach(optimizer: Optimizer) -> WarmUp:
    """Return what warms ``optimizer``'s groups up; it is hooked in at the first call only."""
    found = _ATTACHED.get(optimizer)
    if found is None:
        found = _ATTACHED[optimizer] = WarmUp()
        optimizer.register_step_pre_hook(found.begin)
        optimizer.register_step_post_hook(found.end)
        warm_up = found
        optimizer.register_state_dict_pre_hook(lambda _: warm_up.recover())
    return found


# Two would lower the rate twice. Weak, because nothing here may keep an optimizer alive.
_ATTACHED: WeakKeyDictionary[Optimizer, WarmUp] = WeakKeyDictionary()


def _lower(group: dict[str, Any], share: float) -> _Lowered:
    rate = group["lr"]
    if isinstance(rate, Tensor):
        # In place: a compiled step knows the tensor by its address.
        whole = rate.detach().clone()
        with torch.no_grad():
            rate.mul_(share)
        return _Lowered(group, whole, rate.detach().clone())
    group["lr"] = rate * share
    return _Lowered(group, rate, group["lr"])


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    live = group["lr"]
    if isinstance(live, Tensor):
        with torch.no_grad():
            live.copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate


def _found_infinite(optimizer: Optimizer) -> bool:
    """Tell whether a fused step was called by the gradient scaler but left the weights alone."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
