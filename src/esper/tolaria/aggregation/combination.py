"""From the gradients of several tasks to one in ``.grad``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator, finite_weights
from esper.tolaria.aggregation.gradients import Part, TaskGradients
from esper.tolaria.aggregation.groups import Groups, columns_of
from esper.tolaria.aggregation.pull import Features
from esper.tolaria.aggregation.refreshed import Refreshed
from esper.tolaria.aggregation.report import ConflictReport


@dataclass(frozen=True)
class LossScale:
    """The factor that a gradient scaler puts on every loss; it stays on its device."""

    scaler: torch.amp.GradScaler | None = None
    factor: Tensor | None = None

    @classmethod
    def of(cls, scaler: torch.amp.GradScaler | None, losses: Mapping[str, Tensor]) -> "LossScale":
        """Return the scaler's present factor."""
        if scaler is None:
            return cls()
        device = next(iter(losses.values())).device
        return cls(scaler, scaler.scale(torch.ones((), device=device)).double())

    def apply(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the losses, scaled."""
        if self.scaler is None:
            return losses
        return {task: self.scaler.scale(loss) for task, loss in losses.items()}

    def unscaled(self, gramian: Tensor) -> Tensor:
        """Return the Gramian of the gradients without the factor."""
        # The Gramian of no gradients at all is on the CPU.
        return gramian if self.factor is None else gramian.to(self.factor.device) / self.factor**2


@dataclass(frozen=True)
class Combination:
    """Weighs task gradients and adds them to ``.grad``; see :func:`backward` for the fields."""

    parameters: Sequence[Tensor]
    aggregator: Aggregator
    scale: LossScale
    groups: Groups | None = None
    heads: Sequence[Tensor] | None = None

    def of(self, gradients: TaskGradients) -> ConflictReport:
        """Combine gradients of the parameters themselves.

        All that can fail comes before anything is written.
        """
        shared, apart = self._split(gradients)
        tasks = tuple(gradients.rows)
        parts: list[tuple[Part, Tensor]] = []
        reports: dict[str, ConflictReport] = {}
        for name, members in columns_of(self.groups, self.parameters, shared).items():
            part = gradients.select(members)
            gramian = self.scale.unscaled(part.gramian())
            weights = self._weights(gramian, tasks)
            parts.append((part, weights))
            reports[name] = ConflictReport(tasks, gramian, weights)
        heads = gradients.select(apart)
        for part, weights in parts:
            self._write(part, weights)
        return self._summary(tasks, reports, self._add_up(heads, len(tasks)))

    def at_features(self, features: Features) -> ConflictReport:
        """Weigh by the gradients at the shared representation, and go on with their sum."""
        gramian = self.scale.unscaled(features.representation.gramian())
        weights = self._weights(gramian, tuple(features.heads.rows))
        return self._go_on(features, gramian, weights)

    def refreshed(
        self, aggregator: Refreshed, features: Features, pull: Callable[[], TaskGradients]
    ) -> ConflictReport:
        """Compare the gradients of all tasks when it is time, and else go on with an estimate.

        :param pull: gets the gradients of the parameters themselves.
        """
        tasks = tuple(features.heads.rows)
        lengths = self.scale.unscaled(features.representation.gramian().diagonal()).sqrt()
        estimate = aggregator.estimate(tasks, lengths)
        if estimate is None:
            report = self.of(pull())
            aggregator.keep(tasks, report.gramian, lengths)
            return report
        report = self._go_on(features, estimate, self._weights(estimate, tasks))
        return replace(report, age=aggregator.age)

    def _go_on(self, features: Features, gramian: Tensor, weights: Tensor) -> ConflictReport:
        tasks = tuple(features.heads.rows)
        reached = features.heads.reached()
        heads = features.heads.select([c for c, count in enumerate(reached) if count])
        features.through_trunk(weights)
        squares = self._add_up(heads, len(tasks))
        return ConflictReport(tasks, gramian, weights, squares_apart=squares)

    def _split(self, gradients: TaskGradients) -> tuple[list[int], list[int]]:
        """Return the parameters to project and those to leave as they are, of those reached."""
        counts = gradients.reached()
        alone = self.heads is None and len(gradients.rows) > 1
        named = {id(head) for head in self.heads or ()}
        shared: list[int] = []
        apart: list[int] = []
        for column, count in enumerate(counts):
            if count:
                is_head = count == 1 if alone else id(self.parameters[column]) in named
                (apart if is_head else shared).append(column)
        return shared, apart

    def _weights(self, gramian: Tensor, tasks: tuple[str, ...]) -> Tensor:
        asked = self.aggregator
        if isinstance(asked, Refreshed):
            asked = asked.aggregator
        return finite_weights(asked, gramian, tasks)

    def _write(self, part: Part, weights: Tensor) -> None:
        parameters = [self.parameters[column] for column in part.columns]
        with torch.no_grad():
            sums = part.combine(weights, [parameter.grad for parameter in parameters])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total

    def _add_up(self, part: Part, tasks: int) -> Tensor | None:
        """Add the plain sum of some columns to ``.grad``.

        :returns: the squared norm of each task over them, where a scaler asks for it.
        """
        if part.columns:
            device = self.parameters[part.columns[0]].device
            self._write(part, torch.ones(tasks, dtype=torch.float64, device=device))
        if self.scale.scaler is None:
            return None
        return self.scale.unscaled(part.gramian()).diagonal()

    def _summary(
        self, tasks: tuple[str, ...], reports: dict[str, ConflictReport], squares: Tensor | None
    ) -> ConflictReport:
        if self.groups is None:
            whole = reports[""]
            return ConflictReport(tasks, whole.gramian, whole.weights, squares_apart=squares)
        gramian = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
        for report in reports.values():
            gramian = report.gramian + gramian.to(report.gramian.device)
        weights = [report.weights for report in reports.values()]
        return ConflictReport(
            tasks,
            gramian,
            torch.stack(weights) if weights else gramian[:0],
            groups=reports,
            squares_apart=squares,
        )
