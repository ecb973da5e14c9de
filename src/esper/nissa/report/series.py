"""From records to what is plotted: series over steps, thinned without losing extremes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.leyline import StepRecord

MOST_POINTS = 3000
# A smoothed point averages over about this share of all steps.
_SMOOTHED_SHARE = 0.01

Values = list[float | None]


@dataclass
class Series:
    """One line of a chart.

    :param label: as in the legend.
    :param values: one for each x; None is a gap.
    :param kind: ``line``, ``faint`` (behind its smoothed line) or ``lost`` (taken back).
    :param colour: index into the palette; lines of one task share it.
    """

    label: str
    values: Values
    kind: str = "line"
    colour: int = 0


@dataclass
class Chart:
    """One chart.

    :param key: names it in the page.
    :param title: heading.
    :param x: steps, ascending.
    :param unit: of the y axis.
    :param log: whether a logarithmic axis makes sense.
    """

    key: str
    title: str
    x: list[int]
    series: list[Series] = field(default_factory=list)
    unit: str = ""
    log: bool = False

    def thinned(self, keep: Iterable[int] = ()) -> "Chart":
        """Return the chart with at most about 3,000 points.

        Of each stretch the extremes of every series stay, and so do all points near ``keep``.

        :param keep: steps around which nothing is left out.
        """
        chosen = thin([series.values for series in self.series], len(self.x), MOST_POINTS)
        near = {step + offset for step in keep for offset in range(-25, 26)}
        chosen |= {index for index, step in enumerate(self.x) if step in near}
        order = sorted(chosen)
        return Chart(
            self.key,
            self.title,
            [self.x[index] for index in order],
            [
                Series(s.label, [s.values[index] for index in order], s.kind, s.colour)
                for s in self.series
            ],
            self.unit,
            self.log,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the page's script reads."""
        return {
            "key": self.key,
            "unit": self.unit,
            "log": self.log,
            "x": self.x,
            "series": [
                {"label": s.label, "values": s.values, "kind": s.kind, "colour": s.colour}
                for s in self.series
            ],
        }


def split_kept(steps: Iterable[StepRecord]) -> tuple[list[StepRecord], list[StepRecord]]:
    """Divide records into those that count and those that were taken back.

    :returns: for each step its record of the newest attempt; and, where a rollback or a resume
        went back over it, its record of the attempt before; both by ascending step.
    """
    kept: dict[int, StepRecord] = {}
    lost: dict[int, StepRecord] = {}
    for record in steps:
        earlier = kept.get(record.step)
        if earlier is not None and earlier.attempt != record.attempt:
            lost[record.step] = earlier
        kept[record.step] = record
    _drop_overrun(kept, lost)
    return [kept[step] for step in sorted(kept)], [lost[step] for step in sorted(lost)]


def _drop_overrun(kept: dict[int, StepRecord], lost: dict[int, StepRecord]) -> None:
    """Count steps of an older attempt beyond the last of the newest one as taken back."""
    if not kept:
        return
    newest = max(record.attempt for record in kept.values())
    end = max(step for step, record in kept.items() if record.attempt == newest)
    for step in [step for step in kept if step > end]:
        lost[step] = kept.pop(step)


def step_chart(
    key: str,
    title: str,
    kept: Sequence[StepRecord],
    lost: Sequence[StepRecord],
    readings: dict[str, Callable[[StepRecord], float | None]],
) -> Chart:
    """Make a chart of values read from step records, smoothed where there are enough of them.

    :param readings: how to read each labelled value from a record.
    """
    x = sorted({record.step for record in kept} | {record.step for record in lost})
    place = {step: index for index, step in enumerate(x)}
    chart = Chart(key, title, x)
    for colour, (label, read) in enumerate(readings.items()):
        raw = _on(place, kept, read)
        if len(kept) > 50:
            chart.series.append(Series(label, raw, "faint", colour))
            chart.series.append(Series(label, smooth(raw), "line", colour))
        else:
            chart.series.append(Series(label, raw, "line", colour))
    for colour, (label, read) in enumerate(readings.items()):
        if lost:
            chart.series.append(
                Series(f"{label}, taken back", _on(place, lost, read), "lost", colour)
            )
    return chart


def smooth(values: Values) -> Values:
    """Return the exponential average, without the pull of a start at zero; gaps stay gaps."""
    result: Values = []
    decay = 1 - 1 / max(10.0, _SMOOTHED_SHARE * len(values))
    average = weight = 0.0
    for value in values:
        if value is None:
            result.append(None)
            continue
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def thin(columns: Sequence[Values], length: int, most: int) -> set[int]:
    """Choose which points to plot: of each stretch, the lowest and highest of every column.

    :param columns: values by point; None is a gap.
    :param length: number of points.
    :param most: about how many to choose; all are when there are no more than this.
    """
    if length <= most:
        return set(range(length))
    stretches = max(1, most // max(1, 2 * len(columns)))
    chosen = {0, length - 1}
    for stretch in range(stretches):
        points = range(stretch * length // stretches, (stretch + 1) * length // stretches)
        for column in columns:
            present = [(value, i) for i in points if (value := column[i]) is not None]
            if present:
                chosen |= {min(present)[1], max(present)[1]}
    return chosen


def finite(value: float | None) -> float | None:
    """Return a number that can be drawn, or None."""
    return value if value is not None and math.isfinite(value) else None


def _on(
    place: dict[int, int],
    records: Sequence[StepRecord],
    read: Callable[[StepRecord], float | None],
) -> Values:
    values: Values = [None] * len(place)
    for record in records:
        values[place[record.step]] = finite(read(record))
    return values
