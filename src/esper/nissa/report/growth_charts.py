"""Growth in the charts, in the marks across them, and in the sentence that tells a run."""

from typing import Any

from esper.leyline import Gain, Stage
from esper.nissa.report.growth import LIVE, Change, GrowthStory
from esper.nissa.report.series import Chart, Series, Values, finite

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SIGNS = {Stage.FOSSILISED: "◆", Stage.CULLED: "✕"}


def growth_sentence(story: GrowthStory) -> str:
    """Tell in a clause what became of the seeds."""
    points = story.parameters or [(0, 0)]
    first, last = points[0][1], points[-1][1]
    grown = f" ({first:,} → {last:,} parameters)" if first != last else ""
    fossilised, culled = (_count(story, stage) for stage in (Stage.FOSSILISED, Stage.CULLED))
    living = sum(story.stage_at(slot, story.now) in LIVE for slot in story.slots)
    if not fossilised + culled + living:
        return f"no seed has grown{grown}"
    seeds = "seed" if fossilised < 2 else "seeds"
    parts = [f"{_many(fossilised)} {seeds} {_was(fossilised)} fossilised"]
    if fossilised:
        parts[0], grown = parts[0] + grown, ""
    parts += [f"{_many(culled)} {_was(culled)} culled"] if culled else []
    parts += [f"{_many(living)} {_was(living)} still growing"] if living else []
    return ", ".join(parts) + grown


def growth_marks(story: GrowthStory) -> list[dict[str, Any]]:
    """Return the structural changes that are drawn across the charts."""
    return [
        {"kind": "seed", "at": change.step, "label": f"{sign} {change.report.blueprint}"}
        for change in story.changes
        if (sign := _sign(change))
    ]


def growth_charts(story: GrowthStory) -> list[Chart]:
    """Return the charts of growth; without data for them they have no values."""
    return [_parameters(story), _gains(story)]


def _parameters(story: GrowthStory) -> Chart:
    by_step = dict(story.parameters if story.present else [])
    if by_step:
        by_step.setdefault(story.now, story.parameters[-1][1])
    values: Values = [float(by_step[step]) for step in sorted(by_step)]
    series = Series("parameters", values, "stepped", 2)
    return Chart("parameters", "Parameters of the model", sorted(by_step), [series])


def _gains(story: GrowthStory) -> Chart:
    """Draw what every seed gains on held-out data, by epoch, between the ends of its interval."""
    chart = Chart(
        "gain", "What each seed gains on held-out data", [state.step for state in story.states]
    )
    for colour, slot in enumerate(story.slots):
        gains = [_gain(story, index, slot) for index in range(len(story.states))]
        if any(gains):
            chart.series += [
                Series(slot, [_end(gain, end) for gain in gains], kind, colour)
                for end, kind in (("mean", "points"), ("high", "high"), ("low", "low"))
            ]
    return chart


def _end(gain: Gain | None, end: str) -> float | None:
    return None if gain is None else finite(getattr(gain, end))


def _gain(story: GrowthStory, index: int, slot: str) -> Gain | None:
    growth = story.states[index].growth
    seed = None if growth is None else growth.seeds.get(slot)
    return seed.gain if seed is not None and seed.stage in LIVE else None


def _sign(change: Change) -> str:
    report = change.report
    if report.before is Stage.DORMANT and report.after in LIVE:
        return "+"
    return "" if report.after is None else _SIGNS.get(report.after, "")


def _count(story: GrowthStory, stage: Stage) -> int:
    return sum(change.report.after is stage for change in story.changes)


def _was(count: int) -> str:
    return "was" if count < 2 else "were"


def _many(count: int) -> str:
    return _WORDS[count] if count < len(_WORDS) else str(count)
