"""Metrics on the validation data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.leyline import LossError
from esper.tolaria.data import DataPlan
from esper.tolaria.fetch import fetcher
from esper.tolaria.job import LossFunction, MetricFunction


class Evaluation:
    """Computes the mean of each metric over a data set, in its own order and without gradients.

    :param model: put into evaluation mode meanwhile.
    :param plan: the validation data; None means that nothing is measured.
    :param metrics: see :class:`~esper.tolaria.job.TrainingJob`.
    :param loss: what is measured when there are no metrics.
    :param place: moves a batch to the model's device.
    :ivar plan: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: DataPlan | None,
        *,
        metrics: MetricFunction | None,
        loss: LossFunction,
        place: Callable[[Any], Any],
    ) -> None:
        self._model = model
        self.plan = plan
        self._metrics = metrics
        self._loss = loss
        self._place = place

    def run(self) -> dict[str, float]:
        """Return each metric's mean over all batches that it was measured on.

        Empty without validation data.

        :raises LossError: the metric function returned something that is no number.
        """
        if self.plan is None:
            return {}
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                return self._run(self.plan)
        finally:
            self._model.train(was_training)

    def sample(self, count: int) -> list[Any]:
        """Return so many batches, spread evenly over the data; none without validation data."""
        plan = self.plan
        if plan is None:
            return []
        fetch = fetcher(plan.dataset, plan.collate)
        starts = range(0, plan.samples, plan.batch_size)
        chosen = [starts[i * len(starts) // count] for i in range(min(count, len(starts)))]
        if len(starts) <= count:
            chosen = list(starts)
        return [
            self._place(fetch(list(range(start, min(start + plan.batch_size, plan.samples)))))
            for start in chosen
        ]

    def _run(self, plan: DataPlan) -> dict[str, float]:
        fetch = fetcher(plan.dataset, plan.collate)
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for start in range(0, plan.samples, plan.batch_size):
            samples = list(range(start, min(start + plan.batch_size, plan.samples)))
            content = self._place(fetch(samples))
            for name, value in self._measure(content).items():
                totals[name] = totals.get(name, 0.0) + value * len(samples)
                counts[name] = counts.get(name, 0) + len(samples)
        return {name: total / counts[name] for name, total in totals.items()}

    def _measure(self, content: Any) -> dict[str, float]:  # noqa: ANN401 - the user's batch
        if self._metrics is not None:
            measured = self._metrics(self._model, content)
        else:
            loss = self._loss(self._model, content)
            measured = {"loss": loss} if isinstance(loss, Tensor) else _present(loss)
        try:
            return {str(name): float(value) for name, value in measured.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise LossError(
                f"the metric function returned {type(measured).__qualname__} that is no mapping "
                f"from names to numbers ({error})"
            ) from error


def _present(losses: Any) -> Any:  # noqa: ANN401 - checked by the caller
    if not isinstance(losses, Mapping):
        return losses
    return {task: loss for task, loss in losses.items() if loss is not None}
