"""From a batch to gradients: the losses by task, and their gradients combined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.leyline import LossError
from esper.tolaria.aggregation import Aggregator, ConflictReport, Mode, PCGrad, Sum, backward
from esper.tolaria.guard.running import RunningStatistics
from esper.tolaria.job import LossFunction

SINGLE_TASK = "loss"


@dataclass(slots=True)
class Gradients:
    """What one backward pass left besides the ``.grad`` of the parameters.

    :param losses: value of each task's loss.
    :param total: their sum.
    :param norm: norm of the combined gradient, unscaled; None where it was not asked for.
    :param report: conflicts between the tasks; None where only one gradient was formed.
    """

    losses: dict[str, float]
    total: float
    norm: float | None
    report: ConflictReport | None


class Objective:
    """Computes losses and gradients of one model.

    :param model: called through ``loss``.
    :param loss: see :class:`~esper.tolaria.job.TrainingJob`.
    :param aggregator: combines the tasks' gradients. :class:`Sum` needs no gradient per task, so
        that one backward pass of the summed loss serves and there is no conflict report.
    :param scaler: scales the losses of float16 training.
    :param mode: how the tasks' gradients are obtained; see
        :func:`~esper.tolaria.aggregation.backward`.
    :param measure_norm: whether to compute the norm of the combined gradient.
    :ivar running: statistics of normalisation layers from before the last forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        aggregator: Aggregator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mode: Mode = "sequential",
        measure_norm: bool = True,
    ) -> None:
        self.aggregator: Aggregator = aggregator or PCGrad()
        self.running = RunningStatistics(model)
        self._model = model
        self._loss = loss
        self._scaler = scaler
        self._mode: Mode = mode
        self._measure_norm = measure_norm
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sums = isinstance(self.aggregator, Sum)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters that gradients are computed for."""
        return self._parameters

    def refresh(self) -> None:
        """Look parameters and buffers up again; needed after the model's structure has changed."""
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self.running.refresh()

    def call(self, content: Any) -> Any:  # noqa: ANN401 - the user's batch and losses
        """Return what the loss function says of a batch, as it is."""
        return self._loss(self._model, content)

    def losses(self, content: Any) -> dict[str, Tensor]:  # noqa: ANN401 - the user's batch
        """Run the model on one batch and return its loss by task, without the absent tasks.

        :raises LossError: a loss is not one scalar tensor with a gradient, or there is none.
        """
        self.running.remember()
        returned = self._loss(self._model, content)
        if isinstance(returned, Tensor):
            losses: dict[str, Any] = {SINGLE_TASK: returned}
        elif isinstance(returned, Mapping):
            losses = {task: loss for task, loss in returned.items() if loss is not None}
        else:
            raise LossError(
                f"the loss function returned a {type(returned).__qualname__}; "
                "return one scalar tensor, or a dict of them by task"
            )
        for task, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise LossError(_describe_bad_loss(task, loss))
        if not losses:
            raise LossError("the loss function returned no loss; return one for at least one task")
        return losses

    def backward(self, losses: dict[str, Tensor]) -> Gradients:
        """Fill ``.grad`` from the losses and return their values, with one read from the device."""
        report = None
        if len(losses) == 1 or self._sums:
            total = next(iter(losses.values())) if len(losses) == 1 else _sum(losses)
            scaled: Any = total if self._scaler is None else self._scaler.scale(total)
            scaled.backward()
        else:
            report = backward(
                losses, self._parameters, self.aggregator, mode=self._mode, scaler=self._scaler
            )
        values = self._read(losses)
        norm = values.pop() if self._measure_norm else None
        named = dict(zip(losses, values, strict=True))
        return Gradients(named, sum(values), norm, report)

    def _read(self, losses: dict[str, Tensor]) -> list[float]:
        read = [loss.detach() for loss in losses.values()]
        if self._measure_norm:
            read.append(self._gradient_norm())
        if len(read) > 1 and read[0].is_cuda:
            return torch.stack([value.reshape(()).float() for value in read]).tolist()
        return [value.item() for value in read]

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        norms = torch._foreach_norm(gradients)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm if self._scaler is None else norm / self._scaler.get_scale()


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.reshape(()) for loss in losses.values()]).sum()


def _describe_bad_loss(task: object, loss: object) -> str:
    name = f"the loss of task {task!r}"
    if not isinstance(loss, Tensor):
        return f"{name} is a {type(loss).__qualname__}; return a scalar tensor"
    if loss.numel() != 1:
        return f"{name} has shape {tuple(loss.shape)}; return a scalar (reduce it with .mean())"
    return f"{name} carries no gradient; compute it from the model's output without detach()"
