"""The growing model's part in a run: seeds trained beside the host, measured, and reported."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from esper.core.config import GrowthConfig
from esper.leyline import (
    Action,
    Event,
    FieldReport,
    Grower,
    GrowthState,
    Level,
    Stage,
    Verdict,
)
from esper.tolaria.data import ResumableLoader
from esper.tolaria.evaluation import Evaluation
from esper.tolaria.objective import Objective
from esper.tolaria.recorder import Recorder

_REMEMBERED = 64
_AT_RISK = frozenset({Stage.BLENDING, Stage.HOLDING})


class FieldReports:
    """The newest reports on commands and seeds. A rollback does not take them back."""

    def __init__(self) -> None:
        self._reports: deque[FieldReport] = deque(maxlen=_REMEMBERED)

    def note(self, report: FieldReport) -> None:
        """Remember a report."""
        self._reports.append(report)

    def newest(self) -> list[FieldReport]:
        """Return what is remembered, oldest first."""
        return list(self._reports)

    def state_dict(self) -> dict[str, Any]:
        """Return the reports, of JSON types."""
        return {"reports": msgspec.to_builtins(list(self._reports))}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        reports = msgspec.convert(state_dict["reports"], list[FieldReport])
        self._reports = deque(reports, maxlen=_REMEMBERED)


class Growth:
    """Lets the seeds of a model learn, measures them, and tells what becomes of them.

    :param grower: holds the seeds.
    :param objective: computes the losses.
    :param scaler: scales those of float16 training.
    :param evaluation: has the held-out batches.
    :param data: tells how many steps are left.
    :param recorder: told of every change.
    :ivar on_structure: called when a seed was removed without a command.
    """

    def __init__(
        self,
        grower: Grower,
        objective: Objective,
        scaler: torch.amp.GradScaler | None,
        evaluation: Evaluation,
        data: ResumableLoader,
        recorder: Recorder,
    ) -> None:
        self.reports = FieldReports()
        self.on_structure: Callable[[], None] = _do_nothing
        self.grower = grower
        self._objective = objective
        self._scale = None if scaler is None else scaler.scale
        self._evaluation = evaluation
        self._data = data
        self._recorder = recorder
        self._held_out: Sequence[Any] | None = None
        self._batches = 0

    def configure(self, config: GrowthConfig) -> None:
        """Take over the settings."""
        self.grower.configure(config)
        self._batches = config.held_out_batches

    def train_seeds(self, verdict: Verdict, content: Any) -> None:  # noqa: ANN401 - the batch
        """Fill the gradients of the seeds that learn in isolation, if this step is committed."""
        if verdict.action is Action.COMMIT:
            self.grower.train_seeds(lambda: self._objective.call(content), self._scale)

    def settle(self) -> None:
        """Let stages follow that follow by themselves, and tell."""
        version = self.grower.version
        for report in self.grower.settle():
            self.tell(report)
        if self.grower.version != version:
            self.on_structure()

    def survey(self) -> GrowthState:
        """Measure what the seeds gain on held-out batches."""
        if self._held_out is None:
            self._held_out = self._evaluation.sample(self._batches)
        plan, progress = self._data.plan, self._recorder.update.progress
        left = max(0, plan.batches * self._data.epochs - progress.step)
        return self.grower.survey(self._objective.call, self._held_out, left)

    def tell(self, report: FieldReport) -> None:
        """Remember a report, and emit it as an event."""
        report = msgspec.structs.replace(report, step=self._recorder.update.progress.step)
        self.reports.note(report)
        worrying = not report.applied or report.after is Stage.CULLED
        self._recorder.outlet.emit(
            Event(
                name="seed_changed" if report.applied else "seed_refused",
                time=time.time(),
                message=report.detail,
                step=report.step,
                attempt=self._recorder.attempt,
                level=Level.WARNING if worrying else Level.INFO,
                data=msgspec.to_builtins(report),
            )
        )

    def note_rollback(self, before: dict[str, Stage]) -> None:
        """Tell of the seeds that a rollback has taken back, or that were part of what diverged.

        :param before: the stages before it.
        """
        for name, stage in before.items():
            after = self.grower.stages[name]
            if after is stage and stage not in _AT_RISK:
                continue
            self.tell(
                FieldReport(
                    "rollback",
                    applied=True,
                    detail=f"seed {name!r}: {stage} -> {after}, taken back by a rollback",
                    seed=name,
                    before=stage,
                    after=after,
                    version=self.grower.version,
                )
            )

    @property
    def stages(self) -> dict[str, Stage]:
        """The stage of every slot."""
        return dict(self.grower.stages)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return self.grower.metrics()


class NoGrowth:
    """A model that stays as it is."""

    def __init__(self) -> None:
        self.reports = FieldReports()
        self.stages: dict[str, Stage] = {}

    def train_seeds(self, verdict: Verdict, content: Any) -> None:  # noqa: ANN401
        """Do nothing."""

    def settle(self) -> None:
        """Do nothing."""

    def survey(self) -> None:
        """Measure nothing."""

    def tell(self, report: FieldReport) -> None:
        """Remember a report."""
        self.reports.note(report)

    def note_rollback(self, before: dict[str, Stage]) -> None:
        """Do nothing."""

    def metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}


def _do_nothing() -> None:
    pass
