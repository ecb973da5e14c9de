"""The lives of seeds: from a stage to the next, and from germination to what became of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from esper.leyline import Gain, SeedOperation, SeedState, Stage
from esper.nissa.report.growth import LIVE, Change, Course, GrowthStory

_ENDED = frozenset({Stage.FOSSILISED, Stage.CULLED})
TAKEN_BACK = "taken back"


@dataclass(frozen=True)
class Segment:
    """A seed in one stage.

    :param begin: steps taken when the stage began.
    :param end: steps taken when it ended.
    :param blueprint: what grows.
    :param reason: why the stage began.
    :param fading: whether the seed fades out, on its way to be culled.
    :param alpha: steps and the seed's share then, while it blends.
    :param gain: newest that was measured in this stage.
    """

    slot: str
    stage: Stage
    begin: int
    end: int
    blueprint: str
    reason: str = ""
    fading: bool = False
    alpha: tuple[tuple[int, float], ...] = ()
    gain: Gain | None = None

    @property
    def name(self) -> str:
        """The stage in words."""
        return "fading out" if self.fading else self.stage.value


@dataclass(frozen=True)
class Life:
    """What became of one seed.

    :param begin: steps taken when it germinated.
    :param end: steps taken when it was fossilised or culled, or at the end of the run.
    :param outcome: in words.
    :param gain: newest that was measured.
    :param reason: of the outcome.
    """

    slot: str
    blueprint: str
    begin: int
    end: int
    outcome: str
    gain: Gain | None
    reason: str


def segments(story: GrowthStory, slot: str) -> list[Segment]:
    """Return the stages of one slot in which something grows, grew or may not yet grow again."""
    changes = [change for change in story.changes if change.report.seed == slot]
    found: list[Segment] = []
    for change, end in _with_ends(changes, story.now):
        stage = change.report.after
        if stage is None or stage is Stage.DORMANT:
            # What was fossilised stays in the model, also where the slot has opened again.
            if found and found[-1].stage is Stage.FOSSILISED:
                found[-1] = _extended(found[-1], end)
            continue
        found.append(_segment(story, change, end))
    return found


def lost_segments(course: Course, slot: str) -> list[Segment]:
    """Return the stages that had begun in a course that was taken back."""
    changes = [change for change in course.changes if change.report.seed == slot]
    return [
        Segment(slot, change.report.after, change.step, end, change.report.blueprint, change.reason)
        for change, end in _with_ends(changes, course.last)
        if change.report.after is not None
    ]


def lives(story: GrowthStory) -> list[Life]:
    """Return what became of every seed, those that were taken back included, oldest first."""
    found = [life for slot in story.slots for life in _lives_of(story, slot)]
    found += [life for course in story.courses for life in _taken_back(course)]
    return sorted(found, key=lambda life: (life.begin, life.end))


def _lives_of(story: GrowthStory, slot: str) -> Iterator[Life]:
    group: list[Change] = []
    for change in [change for change in story.changes if change.report.seed == slot]:
        if change.report.before is Stage.DORMANT and group:
            yield _life(story, slot, group)
            group = []
        group.append(change)
    if group:
        yield _life(story, slot, group)


def _life(story: GrowthStory, slot: str, changes: Sequence[Change]) -> Life:
    ended = next((change for change in changes if change.report.after in _ENDED), None)
    last = ended or changes[-1]
    end = ended.step if ended else story.now
    outcome = _outcome(last, ended=ended is not None)
    reasons = [change for change in changes if change.report.operation == SeedOperation.CULL]
    # A seed that fades out is culled steps after that was decided, without a word.
    reason = last.reason or next((change.reason for change in reversed(reasons)), "")
    begin = changes[0].step
    gain = _gain(story, slot, begin, end)
    return Life(slot, last.report.blueprint, begin, end, outcome, gain, reason)


def _outcome(last: Change, *, ended: bool) -> str:
    if last.report.command == "rollback":
        return TAKEN_BACK
    return str(last.report.after) if ended else f"{last.report.after} at the end"


def _taken_back(course: Course) -> Iterator[Life]:
    for slot in dict.fromkeys(change.report.seed for change in course.changes):
        changes = [change for change in course.changes if change.report.seed == slot]
        course_of_stages = [changes[0].report.before, *(c.report.after for c in changes)]
        told = " → ".join(str(stage) for stage in course_of_stages if stage is not None)
        yield Life(
            slot,
            changes[-1].report.blueprint,
            changes[0].step,
            course.last,
            TAKEN_BACK,
            None,
            f"{told}; the {course.cause} went back to step {course.first:,}",
        )


def _segment(story: GrowthStory, change: Change, end: int) -> Segment:
    report, stage = change.report, change.report.after or Stage.DORMANT
    return Segment(
        slot=report.seed,
        stage=stage,
        begin=change.step,
        end=end,
        blueprint=report.blueprint,
        reason=change.reason,
        fading=report.operation == SeedOperation.CULL and stage is Stage.BLENDING,
        alpha=_alpha(story, change, end) if stage is Stage.BLENDING else (),
        gain=_gain(story, report.seed, change.step, end) if stage in LIVE else None,
    )


def _extended(segment: Segment, end: int) -> Segment:
    return Segment(
        segment.slot, segment.stage, segment.begin, end, segment.blueprint, segment.reason
    )


def _with_ends(changes: Sequence[Change], last: int) -> Iterator[tuple[Change, int]]:
    for index, change in enumerate(changes):
        follows = index + 1 < len(changes)
        yield change, changes[index + 1].step if follows else max(last, change.step)


def _alpha(story: GrowthStory, change: Change, end: int) -> tuple[tuple[int, float], ...]:
    """Return the course of a ramp: where it began, what the epochs saw, and where it ended."""
    slot, begin = change.report.seed, change.step
    seen = list(_seen(story, slot))
    before = [seed.alpha for step, seed in seen if step <= begin and seed.stage in LIVE]
    fresh = change.report.before not in (Stage.BLENDING, Stage.HOLDING)
    if change.report.before is Stage.DORMANT:
        start = 1.0
    else:
        start = 0.0 if fresh else (before or [1.0])[-1]
    points = [(begin, start)]
    points += [(s, seed.alpha) for s, seed in seen if begin < s < end]
    return (*points, (end, _arrival(story, change, end, points[-1][1])))


def _arrival(story: GrowthStory, change: Change, end: int, last: float) -> float:
    """Return the share at the end of a ramp: the next epoch sees what it came to."""
    slot = change.report.seed
    following = story.stage_at(slot, end)
    if following is Stage.CULLED:
        return 0.0
    if following not in (Stage.HOLDING, Stage.FOSSILISED):
        return next((seed.alpha for step, seed in _seen(story, slot) if step == end), last)
    held = [s for s in _seen(story, slot) if s[0] >= end and s[1].stage is Stage.HOLDING]
    return held[0][1].alpha if held else 1.0


def _gain(story: GrowthStory, slot: str, begin: int, end: int) -> Gain | None:
    """Return the newest gain that was measured of a seed that began at one step."""
    gains = [
        seed.gain
        for step, seed in _seen(story, slot)
        if begin < step <= end and seed.stage in LIVE and seed.gain is not None
    ]
    return gains[-1] if gains else None


def _seen(story: GrowthStory, slot: str) -> Iterator[tuple[int, SeedState]]:
    for state in story.states:
        if state.growth is not None and slot in state.growth.seeds:
            yield state.step, state.growth.seeds[slot]
