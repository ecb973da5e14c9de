"""What happened in a run, drawn from its records."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from esper.leyline import Event, Record, StepRecord, SystemState
from esper.nissa.report.growth import GrowthStory
from esper.nissa.report.growth_charts import growth_charts, growth_marks, growth_sentence
from esper.nissa.report.series import Chart, Series, finite, split_kept, step_chart


@dataclass
class Story:
    """A run as its report tells it.

    :ivar kept: the steps that count.
    :ivar lost: the steps that were taken back.
    :ivar growth: what became of seeds, where the model had any.
    """

    started: Event | None = None
    ended: Event | None = None
    kept: list[StepRecord] = field(default_factory=list)
    lost: list[StepRecord] = field(default_factory=list)
    epochs: list[SystemState] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    growth: GrowthStory = field(default_factory=GrowthStory)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Story":
        """Sort the records of a run."""
        story = cls()
        steps: list[StepRecord] = []
        epochs: dict[int, SystemState] = {}
        for record in records:
            story.growth.take(record)
            if isinstance(record, StepRecord):
                steps.append(record)
            elif isinstance(record, SystemState):
                epochs[record.epoch] = record
            else:
                story._take_event(record)
        story.kept, story.lost = split_kept(steps)
        story.epochs = [epochs[epoch] for epoch in sorted(epochs)]
        return story

    def _take_event(self, event: Event) -> None:
        self.events.append(event)
        if event.name == "run_started":
            self.started, self.ended = self.started or event, None
        elif event.name == "run_ended":
            self.ended = event

    @property
    def outcome(self) -> str:
        """How the run ended; ``interrupted`` when it did so without a word, or has not ended."""
        return "interrupted" if self.ended is None else str(self.ended.data["outcome"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.kept[-1].losses) if self.kept else []

    @property
    def seconds(self) -> float | None:
        """Time from the first to the last record of the run's attempts, pauses included."""
        if self.started is None or not self.events:
            return None
        last = max(self.events[-1].time, self.kept[-1].time if self.kept else 0.0)
        return last - self.started.time

    @property
    def validation(self) -> dict[str, float]:
        """Newest validation metrics."""
        return self.epochs[-1].validation if self.epochs else {}

    def named(self, name: str) -> list[Event]:
        """Return the events of one name."""
        return [event for event in self.events if event.name == name]

    def conflict_share(self) -> float | None:
        """Mean share of task pairs in conflict over the kept steps."""
        shares = [share for record in self.kept if (share := _share(record)) is not None]
        return sum(shares) / len(shares) if shares else None

    def timings(self) -> dict[str, float]:
        """Mean milliseconds a step by phase."""
        sums: dict[str, float] = {}
        for record in self.kept:
            for phase, milliseconds in record.timings_ms.items():
                sums[phase] = sums.get(phase, 0.0) + milliseconds
        return {phase: total / len(self.kept) for phase, total in sums.items()}

    def sentence(self) -> str:
        """Tell the run in one sentence."""
        seconds = self.seconds
        parts = [f"{len(self.epochs)} epochs" + (f" in {seconds:.0f} s" if seconds else "")]
        rollbacks = self.named("rollback")
        if len(rollbacks) == 1:
            data = rollbacks[0].data
            parts.append(
                f"a divergence at step {data['from_step']} was taken back to step "
                f"{data['to_step']} in {data['latency_ms']:.1f} ms"
            )
        elif rollbacks:
            parts.append(f"{len(rollbacks)} divergences were taken back")
        if self.growth.present:
            parts.append(growth_sentence(self.growth))
        if self.validation:
            metrics = ", ".join(f"{n} {value:.4g}" for n, value in self.validation.items())
            parts.append(f"it ended at {metrics}")
        return "; ".join(parts) + "."

    def marks(self) -> list[dict[str, Any]]:
        """Return what is drawn across the charts: rollbacks, injected faults, growth."""
        marks: list[dict[str, Any]] = [
            {
                "kind": "rollback",
                "from": event.data["from_step"],
                "to": event.data["to_step"],
                "label": f"rollback {event.data['from_step']} → {event.data['to_step']}",
            }
            for event in self.named("rollback")
        ]
        marks += [
            {"kind": "drill", "at": event.data["step"], "label": "drill"}
            for event in self.named("drill_injected")
        ]
        return marks + growth_marks(self.growth)

    def charts(self) -> list[Chart]:
        """Return every chart that there is data for."""
        charts = [self._loss_chart(), self._validation_chart(), *self._conflict_charts()]
        charts += [
            step_chart(
                "gradient",
                "Gradient norm",
                self.kept,
                self.lost,
                {"gradient norm": lambda record: record.gradient_norm},
            ),
            step_chart(
                "rate",
                "Learning rate",
                self.kept,
                [],
                {"learning rate": lambda record: record.learning_rate},
            ),
        ]
        charts[-1].series = charts[-1].series[:1]
        for series in charts[-1].series:
            series.kind = "line"
        charts[-2].log = True
        charts += growth_charts(self.growth)
        around = [step for mark in self.marks() for step in mark.values() if isinstance(step, int)]
        drawn = [chart for chart in charts if any(_has_value(s) for s in chart.series)]
        return [chart.thinned(around) for chart in drawn]

    def _loss_chart(self) -> Chart:
        chart = step_chart(
            "loss",
            "Training loss by task",
            self.kept,
            self.lost,
            {task: _reader("losses", task) for task in self.tasks},
        )
        chart.log = True
        return chart

    def _validation_chart(self) -> Chart:
        x = [state.step for state in self.epochs]
        chart = Chart("validation", "Validation by epoch", x)
        names = list(self.validation)
        for colour, name in enumerate(names):
            values = [finite(state.validation.get(name)) for state in self.epochs]
            chart.series.append(Series(name, values, "points", colour))
        return chart

    def _conflict_charts(self) -> list[Chart]:
        pairs = list(self.kept[-1].cosines) if self.kept else []
        if not pairs:
            return []
        share = step_chart(
            "conflict", "Conflict rate", self.kept, [], {"conflict rate": lambda r: r.conflict_rate}
        )
        share.series = share.series[-1:]
        cosine = step_chart(
            "cosine",
            "Cosine between task gradients",
            self.kept,
            self.lost,
            {pair.replace("|", " · "): _reader("cosines", pair) for pair in pairs},
        )
        return [share, cosine]


def _reader(attribute: str, key: str) -> Any:  # noqa: ANN401 - a reading of step_chart
    return lambda record: getattr(record, attribute).get(key)


def _share(record: StepRecord) -> float | None:
    if record.conflicts is None or not record.cosines:
        return None
    return record.conflicts / len(record.cosines)


def _has_value(series: Series) -> bool:
    return any(value is not None for value in series.values)
