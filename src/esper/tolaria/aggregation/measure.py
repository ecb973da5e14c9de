"""Which mode is fastest depends on the model, the batch and the machine: measure it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from esper.tolaria.aggregation.backward import backward, trainable
from esper.tolaria.aggregation.base import Aggregator
from esper.tolaria.aggregation.pull import MODES, Mode
from esper.tolaria.aggregation.refreshed import Refreshed


def measure_modes(
    losses: Callable[[], Mapping[str, Tensor]],
    parameters: Iterable[Tensor],
    aggregator: Aggregator,
    *,
    repeats: int = 5,
) -> dict[Mode, float]:
    """Time a forward pass and :func:`backward` in every mode; ``.grad`` is left as it was.

    Random generators and statistics such as those of batch norm move on. A mode that the model does
    not allow is left out.

    :param losses: runs the forward pass on a batch as in training, and returns its losses.
    :param repeats: timings for each mode, taken in turns; the shortest counts.
    :raises RuntimeError: the aggregator is :class:`Refreshed`, or there is nothing to repeat; or
        what mode ``sequential`` raises.
    :returns: seconds by mode, the fastest first. ``features`` is approximate; all others are exact.
    """
    _check(aggregator, repeats)
    parameters = trainable(parameters)
    held = [parameter.grad for parameter in parameters]
    best: dict[Mode, float] = dict.fromkeys(MODES, float("inf"))
    try:
        for _ in range(repeats):
            for mode in list(best):
                try:
                    seconds = _time(losses, parameters, aggregator, mode)
                except RuntimeError as error:
                    if mode == "sequential" or isinstance(error, torch.OutOfMemoryError):
                        raise
                    del best[mode]
                else:
                    best[mode] = min(best[mode], seconds)
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient
    return dict(sorted(best.items(), key=lambda item: item[1]))


def _time(
    losses: Callable[[], Mapping[str, Tensor]],
    parameters: Sequence[Tensor],
    aggregator: Aggregator,
    mode: Mode,
) -> float:
    for parameter in parameters:
        parameter.grad = None
    began = time.perf_counter()
    report = backward(losses(), parameters, aggregator, mode=mode)
    if report.weights.is_cuda:
        torch.cuda.synchronize(report.weights.device)
    return time.perf_counter() - began


def _check(aggregator: Aggregator, repeats: int) -> None:
    if repeats < 1:
        raise RuntimeError(f"repeats is {repeats}; give 1 or more")
    if isinstance(aggregator, Refreshed):
        raise RuntimeError(
            "a refreshed aggregator goes through the trunk once whatever the mode; measure with "
            "the aggregator that it asks"
        )
