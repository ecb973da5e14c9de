"""The comparison of arms in the page: dots with intervals, and a table."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from esper.nissa.report.comparison import (
    ARMS,
    GROWN,
    LARGE,
    SMALL,
    Comparison,
    Measure,
    difference_text,
    failures,
    interval_text,
    measures,
    verdicts,
)
from esper.nissa.report.html import table
from esper.nissa.report.student import Interval

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP, _FOOT = 520, 118, 20, 30, 6, 24


def comparison_section(comparison: Comparison | None) -> str:
    """Return the section, as HTML; nothing without a comparison."""
    if comparison is None:
        return ""
    found = measures(comparison)
    plots = "".join(_figure(measure) for measure in found if not measure.is_cost)
    sentences = [*verdicts(comparison), *failures(comparison)]
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return (
        '<section class="comparison"><h2>What growth has brought</h2>'
        f'<p class="hint">{escape(_what(comparison))}</p><ul class="verdicts">{told}</ul>'
        f'<div class="charts">{plots}</div>'
        f'<div class="scroll">{_table(found)}</div>'
        f'<p class="note">{escape(_notes(found))}</p></section>'
    )


def _what(comparison: Comparison) -> str:
    trained = ", ".join(f"{arm} {comparison.targets.get(arm, '')}" for arm in ARMS)
    return f"{len(comparison.seeds)} paired seeds of each arm: {trained}."


def _notes(found: Sequence[Measure]) -> str:
    metrics = [m for m in found if not m.is_cost]
    directions = ", ".join(
        f"{m.name}: {'lower' if m.less_is_better else 'higher'} is better" for m in metrics
    )
    notes = [f"Taken for granted: {directions}."] if directions else []
    notes.append(
        "Mean ± 95 % confidence interval (Student's t) over seeds. An interval of the difference "
        "that contains zero shows no benefit. Nothing was tuned for any arm."
    )
    if any(m.name == "operations" for m in found):
        notes.append(
            "Operations are floating-point operations of training steps, with second passes and "
            "surveys of seeds and structural changes, without validation."
        )
    return " ".join(notes)


def _table(found: Sequence[Measure]) -> str:
    head = ("", *ARMS, "grown minus small (95 %)", "grown minus large (95 %)", "in words")
    rows = [
        (
            escape(measure.name),
            *(interval_text(measure.intervals[arm]) for arm in ARMS),
            *(difference_text(difference.interval) for difference in measure.differences),
            ""
            if measure.is_cost
            else escape("; ".join(difference.verdict for difference in measure.differences)),
        )
        for measure in found
    ]
    return table(head, rows, "arms")


def _figure(measure: Measure) -> str:
    better = "lower" if measure.less_is_better else "higher"
    return (
        f"<figure><figcaption><h3>{escape(measure.name)}</h3>"
        f'<span class="hint">{better} is better</span></figcaption>{_arms(measure)}'
        f"{_differences(measure)}"
        '<p class="note">Dots: each seed. Bars: mean and 95 % interval.</p></figure>'
    )


def _arms(measure: Measure) -> str:
    rows = [(arm, list(measure.values[arm].values()), measure.intervals[arm]) for arm in ARMS]
    return _plot(rows, f"{measure.name} by arm", zero=False)


def _differences(measure: Measure) -> str:
    grown = measure.values[GROWN]
    rows = []
    for other, difference in zip((SMALL, LARGE), measure.differences, strict=True):
        against = measure.values[other]
        values = [grown[seed] - against[seed] for seed in grown if seed in against]
        rows.append((f"grown - {other}", values, difference.interval))
    return _plot(rows, f"{measure.name}: paired differences", zero=True)


def _plot(
    rows: Sequence[tuple[str, list[float], Interval | None]], title: str, *, zero: bool
) -> str:
    low, high = _range([value for _, values, found in rows for value in _extent(values, found)])
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    bottom = _TOP + _ROW * len(rows)
    parts = list(_ticks(low, high, at(low), at(high), bottom))
    if zero:
        parts.append(f'<path class="zero" d="M{at(0.0)} {_TOP}V{bottom}"/>')
    for index, (label, values, found) in enumerate(rows):
        y = _TOP + _ROW * index + _ROW // 2
        parts.append(f'<text class="slot" x="{_LEFT - 10}" y="{y + 4}">{escape(label)}</text>')
        parts += [f'<circle cx="{at(value)}" cy="{y + 6}" r="3"/>' for value in values]
        if found is not None and math.isfinite(found.reach):
            parts.append(f'<path class="reach" d="M{at(found.low)} {y - 4}H{at(found.high)}"/>')
        if found is not None:
            told = f"{label}: {interval_text(found)}"
            x = at(found.mean)
            parts.append(
                f'<g class="mean"><title>{escape(told)}</title>'
                f'<path d="M{x} {y - 10}L{x + 6} {y - 4}L{x} {y + 2}L{x - 6} {y - 4}Z"/></g>'
            )
    return (
        f'<svg class="dots" viewBox="0 0 {_WIDTH} {bottom + _FOOT}" role="img" '
        f'aria-label="{escape(title)}; the table has the numbers">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float, left: float, right: float, bottom: int) -> Iterator[str]:
    """Draw lines at about four round values."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    unit *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= 5)
    digits = max(0, -math.floor(math.log10(unit)))
    for count in range(math.ceil(low / unit), math.floor(high / unit) + 1):
        x = round(left + (count * unit - low) / (high - low) * (right - left), 1)
        yield f'<path class="grid" d="M{x} {_TOP}V{bottom}"/>'
        yield f'<text class="tick" x="{x}" y="{bottom + 16}">{count * unit:.{digits}f}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value, never the same."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    half = max(abs(low), 1e-9) * 0.05
    return (low, high) if high > low else (low - half, high + half)


def _extent(values: Sequence[float], found: Interval | None) -> Iterator[float]:
    yield from values
    if found is not None and math.isfinite(found.reach):
        yield from (found.low, found.high)
