"""A drawing of the lives of seeds: one lane for each slot, over training steps."""

from collections.abc import Iterator, Sequence
from html import escape

from esper.leyline import Gain, Stage
from esper.nissa.report.growth import LIVE, Course, GrowthStory
from esper.nissa.report.html import ABSENT, table
from esper.nissa.report.lives import Life, Segment, lives, lost_segments, segments

WIDTH, LEFT, RIGHT, TOP = 1000, 150, 16, 8
LANE, BAR, BELOW, FOOT = 58, 22, 20, 26
_LETTER = 6.4
_LONGEST_NAME = 22
_NARROWEST = 3.0
_LEGEND = (
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.BLENDING,
    Stage.HOLDING,
    Stage.FOSSILISED,
    Stage.EMBARGOED,
)
_MARKS = {Stage.FOSSILISED: "◆", Stage.CULLED: "✕"}
_PATTERNS = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path class="hatch" d="M0 0V6"/></pattern></defs>'
)


def life_of_seeds(story: GrowthStory) -> str:
    """Return drawing, legend and table, as HTML."""
    return (
        f'<div class="scroll lanes">{_drawing(story)}</div>{_legend(story)}'
        f'<div class="scroll">{_rows(lives(story))}</div>'
    )


def gain_text(gain: Gain | None) -> str:
    """Return a gain with its confidence interval, or nothing."""
    if gain is None:
        return ""
    return f"{gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g})"


class _Scale:
    """Where a step lies.

    :param end: the last step.
    """

    def __init__(self, end: int) -> None:
        self.end = max(1, end)

    def __call__(self, step: float) -> float:
        share = min(max(step / self.end, 0.0), 1.0)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def span(self, begin: int, end: int) -> tuple[float, float]:
        """Return left end and width, wide enough to be seen."""
        width = max(self(end) - self(begin), _NARROWEST)
        return min(self(begin), WIDTH - RIGHT - width), round(width, 1)


def _drawing(story: GrowthStory) -> str:
    slots = story.slots
    at = _Scale(max([story.now, *(course.last for course in story.courses)]))
    bottom = TOP + LANE * len(slots)
    parts = [_PATTERNS, *_axis(at, bottom)]
    parts += [_wash(course, at, bottom) for course in story.courses]
    for index, slot in enumerate(slots):
        parts += _lane(story, slot, at, TOP + LANE * index)
    told = f"Stages of the seeds in {len(slots)} slots over {at.end:,} steps; the table has them"
    return (
        f'<svg class="seeds" viewBox="0 0 {WIDTH} {bottom + FOOT}" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>'
    )


def _axis(at: _Scale, bottom: int) -> Iterator[str]:
    for step in _ticks(at.end):
        x = at(step)
        yield f'<path class="grid" d="M{x} {TOP}V{bottom}"/>'
        yield f'<text class="tick" x="{x}" y="{bottom + 16}">{step:,}</text>'


def _ticks(end: int) -> list[int]:
    """Return about six round steps."""
    size = 10 ** (len(str(end)) - 1)
    for unit in (size // 10 * 2, size // 2, size, 2 * size):
        if unit >= 1 and end / unit <= 7:
            return list(range(0, end + 1, unit))
    return [0, end]


def _wash(course: Course, at: _Scale, bottom: int) -> str:
    x, width = at.span(course.first, course.last)
    told = f"{course.cause}: steps {course.first:,} to {course.last:,} were taken back"
    return (
        f'<g class="taken"><title>{escape(told)}</title>'
        f'<rect x="{x}" y="{TOP}" width="{width}" height="{bottom - TOP}"/>'
        f'<path d="M{round(x + width, 1)} {TOP}V{bottom}"/></g>'
    )


def _lane(story: GrowthStory, slot: str, at: _Scale, top: int) -> Iterator[str]:
    middle = top + BELOW + BAR
    yield f'<path class="ground" d="M{LEFT} {middle}H{WIDTH - RIGHT}"/>'
    yield (
        f'<text class="slot" x="{LEFT - 10}" y="{middle - 6}"><title>{escape(slot)}</title>'
        f"{escape(_shortened(slot))}</text>"
    )
    found = segments(story, slot)
    for index, segment in enumerate(found):
        yield _bar(segment, at, top + BELOW)
        # Behind a stage in which a seed lives, there is the same one still.
        new = index == 0 or found[index - 1].stage not in LIVE
        if new and segment.stage in LIVE:
            yield _name(segment, found[index:], at, top + BELOW - 6)
    for course in story.courses:
        for segment in lost_segments(course, slot):
            yield _lost(segment, course, at, middle + 3)


def _name(segment: Segment, following: Sequence[Segment], at: _Scale, y: int) -> str:
    """Write what grows above the bars of one seed, where there is room for it."""
    end = next((s.begin for s in following[1:] if s.stage is Stage.GERMINATED), at.end)
    room = at(end) - at(segment.begin)
    if len(segment.blueprint) * _LETTER > room:
        return ""
    x = at(segment.begin)
    return f'<text class="blueprint" x="{x}" y="{y}">{escape(segment.blueprint)}</text>'


def _bar(segment: Segment, at: _Scale, top: int) -> str:
    x, width = at.span(segment.begin, segment.end)
    parts = [f"<title>{escape(_told(segment))}</title>"]
    parts.append(f'<rect class="box" x="{x}" y="{top}" width="{width}" height="{BAR}"/>')
    if segment.stage is Stage.TRAINING:
        parts.append(f'<rect x="{x}" y="{top}" width="{width}" height="{BAR}" fill="url(#hatch)"/>')
    if segment.alpha:
        parts.append(f'<polygon class="ramp" points="{_ramp(segment, at, top)}"/>')
    label = segment.name
    if len(label) * _LETTER + 8 <= width:
        parts.append(f'<text x="{x + 5}" y="{top + 15}">{escape(label)}</text>')
    if segment.stage in _MARKS:
        mark = _MARKS[segment.stage]
        parts.append(f'<text class="mark" x="{x}" y="{top - 4}">{mark}</text>')
    return f'<g class="seed {segment.stage.value}">{"".join(parts)}</g>'


def _ramp(segment: Segment, at: _Scale, top: int) -> str:
    """Return the corners of what lies below the course of the seed's share."""
    bottom = top + BAR
    points = [(at(step), round(bottom - share * BAR, 1)) for step, share in segment.alpha]
    corners = [(points[0][0], bottom), *points, (points[-1][0], bottom)]
    return " ".join(f"{x},{y}" for x, y in corners)


def _lost(segment: Segment, course: Course, at: _Scale, top: int) -> str:
    x, width = at.span(segment.begin, segment.end)
    told = f"taken back by the {course.cause}: {_told(segment)}"
    return (
        f'<g class="lost"><title>{escape(told)}</title>'
        f'<rect x="{x}" y="{top}" width="{width}" height="8"/></g>'
    )


def _told(segment: Segment) -> str:
    lines = [
        f"{segment.slot} ({segment.blueprint}): {segment.name}",
        f"steps {segment.begin:,} to {segment.end:,}",
        segment.reason,
        f"gain on held-out data {gain_text(segment.gain)}" if segment.gain else "",
    ]
    return "\n".join(line for line in lines if line)


def _shortened(slot: str) -> str:
    return slot if len(slot) <= _LONGEST_NAME else f"…{slot[1 - _LONGEST_NAME :]}"


def _legend(story: GrowthStory) -> str:
    items = [
        f'<li><svg viewBox="0 0 26 14" aria-hidden="true"><g class="seed {stage.value}">'
        f'<rect class="box" x="1" y="1" width="24" height="12"/>{_swatch(stage)}</g></svg>'
        f"{stage.value}</li>"
        for stage in _LEGEND
    ]
    items += ["<li>◆ fossilised: part of the model for good</li>", "<li>✕ culled</li>"]
    if story.courses:
        items.append("<li>red, dashed: taken back</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _swatch(stage: Stage) -> str:
    if stage is Stage.TRAINING:
        return '<rect x="1" y="1" width="24" height="12" fill="url(#hatch)"/>'
    if stage is Stage.BLENDING:
        return '<polygon class="ramp" points="1,13 25,1 25,13"/>'
    return ""


def _rows(found: Sequence[Life]) -> str:
    head = ("slot", "blueprint", "from step", "to step", "outcome", "gain (95 %)", "reason")
    rows = [
        (
            f"<code>{escape(life.slot)}</code>",
            escape(life.blueprint),
            f"{life.begin:,}",
            f"{life.end:,}",
            f'<span class="outcome">{escape(life.outcome)}</span>',
            gain_text(life.gain) or ABSENT,
            escape(life.reason),
        )
        for life in found
    ]
    return table(head, rows, "lives", [life.outcome.split()[0] for life in found])
