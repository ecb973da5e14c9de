"""What growth is worth: losses on held-out batches, with and without each seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.probe import quietly
from esper.kasmina.shadow import Losses, total_of
from esper.kasmina.slot import Passage, Slot
from esper.leyline import Gain, GrowthError

Loss = Callable[[Any], Losses]
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T_LARGE = ((15, 2.131), (20, 2.086), (30, 2.042), (60, 2.0))
_NORMAL = 1.96


@dataclass
class Survey:
    """What was measured at one boundary.

    :ivar held_out: mean loss by task, isolated seeds left out.
    :ivar gains: by slot, where a seed grows.
    :ivar residuals: by slot.
    """

    held_out: dict[str, float] = field(default_factory=dict)
    gains: dict[str, Gain] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)


def survey(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    slots: Mapping[str, Slot],
    apart: Sequence[str],
    blended: Sequence[str],
) -> Survey:
    """Measure in evaluation mode; the model is as it was afterwards.

    :param loss: of one batch.
    :param batches: held out from training; at least two for a confidence interval.
    :param slots: all of them.
    :param apart: names of those whose seed trains in isolation: the gain is that of its whole
        output, measured beside the model.
    :param blended: names of those that the model contains: the gain is against their absence.
    """
    found = Survey()
    if not batches:
        return found
    differences: dict[str, list[float]] = {name: [] for name in (*apart, *blended)}
    losses: dict[str, list[float]] = {}
    with quietly(model, training=False):
        for batch in batches:
            by_task = _by_task(loss(batch))
            for task, value in by_task.items():
                losses.setdefault(task, []).append(value)
            base = sum(by_task.values())
            for name in apart:
                changed = _otherwise(loss, batch, slots[name], Passage.SHADOW)
                differences[name].append(base - changed)
            for name in blended:
                changed = _otherwise(loss, batch, slots[name], Passage.HOST)
                differences[name].append(changed - base)
        found.residuals = _residuals(loss, batches[0], slots)
    found.held_out = {task: sum(values) / len(values) for task, values in losses.items()}
    found.gains = {n: gain_of(values) for n, values in differences.items() if _is_sound(values)}
    return found


def gain_of(differences: Sequence[float]) -> Gain:
    """Return mean and 95 % confidence interval (Student's t) of two or more paired differences."""
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    reach = _quantile(count - 1) * math.sqrt(variance / count)
    return Gain(mean, mean - reach, mean + reach, count)


def gradient_at(loss: Loss, batch: Any, slot: Slot) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return what a seed in a slot would be given, and the loss's gradient at the slot's output.

    :raises GrowthError: the loss has no gradient there.
    """
    with torch.enable_grad(), slot.watched():
        if slot.tap is not None:
            slot.tap.open = True
        total = total_of(loss(batch))
        seen, gradient = slot.seen, None
        if seen is not None and seen.requires_grad and total.requires_grad:
            (gradient,) = torch.autograd.grad(total, seen, allow_unused=True)
        if seen is None or gradient is None:
            raise GrowthError(f"no gradient of the loss gets to slot {slot.name!r}; use 'zero_out'")
        source = seen if slot.tap is None else slot.tap.take()
    return source.detach(), gradient


def _otherwise(loss: Loss, batch: Any, slot: Slot, passage: Passage) -> float:  # noqa: ANN401
    """Return the loss of a batch with something else at one slot."""
    with slot.passing(passage):
        return float(total_of(loss(batch)))


def _is_sound(differences: Sequence[float]) -> bool:
    """Tell what was measured: one pair tells not how sure it is, and what is not finite nothing."""
    return len(differences) > 1 and all(map(math.isfinite, differences))


def _residuals(loss: Loss, batch: Any, slots: Mapping[str, Slot]) -> dict[str, float]:  # noqa: ANN401
    """Return by slot how strongly the loss pulls at its output, one backward pass for all."""
    with torch.enable_grad(), ExitStack() as stack:
        for slot in slots.values():
            stack.enter_context(slot.watched())
        total = total_of(loss(batch))
        seen = {name: slot.seen for name, slot in slots.items()}
        pulled = {n: h for n, h in seen.items() if h is not None and h.requires_grad}
        if not total.requires_grad or not pulled:
            return {}
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            total, list(pulled.values()), allow_unused=True
        )
    return {
        name: float(gradient.norm() * output.detach().norm())
        for (name, output), gradient in zip(pulled.items(), gradients, strict=True)
        if gradient is not None
    }


def _by_task(losses: Losses) -> dict[str, float]:
    if isinstance(losses, Tensor):
        return {"loss": float(losses)}
    return {task: float(loss) for task, loss in losses.items() if loss is not None}


def _quantile(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    return next((quantile for most, quantile in _T_LARGE if freedom <= most), _NORMAL)
