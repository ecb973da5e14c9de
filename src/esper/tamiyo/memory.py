"""What the growth rules remember from one state to the next."""

import math

import msgspec

from esper.leyline import (
    AdaptationCommand,
    Gain,
    GrowthState,
    NoChange,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
    SystemState,
)
from esper.tamiyo.limits import RuleLimits
from esper.tamiyo.price import expected_share, price_of_seed
from esper.tamiyo.trend import Trend, progress

_KEPT = 64
BLENDED = frozenset({Stage.BLENDING, Stage.HOLDING})


class Evaluation(msgspec.Struct, frozen=True):
    """The losses of one state: over the epoch's training batches, and over the held-out ones."""

    epoch: int
    step: int
    training: float
    held_out: float | None


class Watch(msgspec.Struct):
    """One seed in its present stage.

    :ivar evaluations: at which its gain was measured.
    :ivar harmful: the newest of them, in a row, that found it below zero beyond doubt.
    :ivar paying: the newest of them, in a row, that found it above its price.
    :ivar descending: its share was sent down to zero.
    """

    stage: Stage
    evaluations: int = 0
    harmful: int = 0
    paying: int = 0
    descending: bool = False


class Asked(msgspec.Struct, frozen=True):
    """The command that there was no word of yet."""

    seed: str
    operation: SeedOperation
    epoch: int
    step: int
    structural: bool


class Outcome(msgspec.Struct):
    """How seeds of one blueprint did.

    :ivar tried: how often it was germinated.
    :ivar measured: how many of its seeds were measured to their end.
    :ivar ratio: sum of what they gained over what was expected of them.
    """

    tried: int = 0
    measured: int = 0
    ratio: float = 0.0


class Memory(msgspec.Struct):
    """Everything that is remembered; the field names are those of the saved state.

    :ivar changes: epoch and step of the newest structural changes.
    :ivar cuts: epoch and step of the cuts of the learning rate.
    :ivar fit: ``under``, ``over`` or neither, with hysteresis.
    :ivar steady: evaluations in a row that speak for germination.
    """

    attempt: int = 0
    epoch: int = -1
    step: int = -1
    version: int | None = None
    evaluations: list[Evaluation] = []
    watches: dict[str, Watch] = {}
    asked: Asked | None = None
    changes: list[tuple[int, int]] = []
    cuts: list[tuple[int, int]] = []
    outcomes: dict[str, Outcome] = {}
    fit: str = ""
    steady: int = 0

    def is_stale(self, state: SystemState) -> bool:
        """Whether a newer state was seen before."""
        return (state.attempt, state.step) < (self.attempt, self.step)

    def is_repeated(self, state: SystemState) -> bool:
        """Whether this very state was seen last."""
        return (state.attempt, state.step) == (self.attempt, self.step)

    def take(self, state: SystemState, limits: RuleLimits) -> None:
        """Take in a state that is neither stale nor repeated."""
        if state.step <= self.step:
            self._rewind(state.step)
        growth = state.growth
        if growth is not None:
            self._note_version(growth)
        self._settle(state, limits)
        if growth is not None:
            self._watch(growth, limits)
        evaluation = evaluation_of(state)
        if evaluation is not None:
            self.evaluations = [*self.evaluations, evaluation][-_KEPT:]
            self._judge_fit(evaluation, limits)
        self.attempt, self.epoch, self.step = state.attempt, state.epoch, state.step

    def note(self, command: AdaptationCommand, state: SystemState, limits: RuleLimits) -> None:
        """Remember what was decided."""
        now = state.epoch, state.step
        if isinstance(command, ScaleLearningRate):
            self.cuts = [*self.cuts, now]
        if isinstance(command, NoChange | ScaleLearningRate) or state.growth is None:
            return
        seed, changing = state.growth.seeds[command.seed], is_structural(command, state.growth)
        self.asked = Asked(command.seed, command.operation, *now, changing)
        if command.operation is SeedOperation.RETARGET and command.seed in self.watches:
            self.watches[command.seed].descending = command.target == 0
        if command.operation is SeedOperation.GERMINATE:
            self._outcome(command.blueprint).tried += 1
        if changing:
            self.changes = [*self.changes, now][-_KEPT:]
            self._note_outcome(seed, state.growth, limits)

    def trend(self, limits: RuleLimits) -> Trend | None:
        """Return by which share the held-out loss falls in an epoch; training's without one."""
        newest = self.evaluations[-max(5, limits.trend_evaluations) :]
        held = [e.held_out for e in newest if e.held_out is not None]
        losses = held if len(held) == len(newest) else [e.training for e in newest]
        return progress([float(e.epoch) for e in newest], losses)

    def window_left(self, epoch: int, limits: RuleLimits) -> int:
        """Return the epochs until the next structural change may be asked for."""
        if not self.changes:
            return 0
        return max(0, limits.window_epochs - max(0, epoch - self.changes[-1][0]))

    def steps_per_evaluation(self) -> float | None:
        """Return the steps between the newest two evaluations."""
        if len(self.evaluations) < 2:
            return None
        return float(self.evaluations[-1].step - self.evaluations[-2].step)

    def skill(self, blueprint: str) -> float:
        """Return what seeds of a blueprint gained over what was expected, drawn towards 1."""
        outcome = self.outcomes.get(blueprint, Outcome())
        return (1.0 + outcome.ratio) / (1.0 + outcome.measured)

    def _rewind(self, step: int) -> None:
        """Forget what a rollback has taken back."""
        self.evaluations = [e for e in self.evaluations if e.step < step]
        self.changes = [change for change in self.changes if change[1] < step]
        self.cuts = [cut for cut in self.cuts if cut[1] < step]
        self.watches, self.asked, self.version, self.steady = {}, None, None, 0

    def _note_version(self, growth: GrowthState) -> None:
        """Count a structural change that somebody else has made."""
        asked = self.asked is not None and self.asked.structural
        if self.version is not None and growth.version != self.version and not asked:
            self.changes = [*self.changes, (self.epoch, self.step)][-_KEPT:]

    def _settle(self, state: SystemState, limits: RuleLimits) -> None:
        asked, growth = self.asked, state.growth
        version = None if growth is None else growth.version
        if asked is not None:
            told = any(
                report.seed == asked.seed
                and report.operation == asked.operation
                and report.step >= asked.step
                for report in state.reports
            )
            changed = asked.structural and version != self.version
            if told or changed or state.epoch - asked.epoch > limits.pending_epochs:
                self.asked = None
        self.version = version

    def _watch(self, growth: GrowthState, limits: RuleLimits) -> None:
        known, self.watches = self.watches, {}
        for name, seed in growth.seeds.items():
            watch = known.get(name)
            if watch is None or watch.stage is not seed.stage:
                down = watch is not None and watch.descending and seed.stage in BLENDED
                watch = Watch(seed.stage, descending=down)
            gain = measured(seed.gain)
            if gain is not None:
                price = price_of_seed(seed, growth, limits) * scale_of(growth)
                watch.evaluations += 1
                watch.harmful = watch.harmful + 1 if gain.high < 0 else 0
                watch.paying = watch.paying + 1 if gain.mean > price else 0
            self.watches[name] = watch

    def _judge_fit(self, evaluation: Evaluation, limits: RuleLimits) -> None:
        gap, trend = gap_of(evaluation), self.trend(limits)
        if gap is None:
            self.fit, self.steady = "", 0
            return
        if gap <= limits.under_fit_gap:
            self.fit = "under"
        elif gap >= limits.over_fit_gap or self.fit == "over":
            self.fit = "over"
        else:
            self.fit = ""
        slow = trend is not None and trend.high < limits.slow_progress
        speaks = self.fit == "under" or (slow and self.fit != "over")
        self.steady = self.steady + 1 if speaks else 0

    def _note_outcome(self, seed: SeedState, growth: GrowthState, limits: RuleLimits) -> None:
        gain = measured(seed.gain)
        if gain is None or not seed.blueprint:
            return
        expected = expected_share(seed.parameters, growth.parameters - seed.parameters, limits)
        outcome = self._outcome(seed.blueprint)
        outcome.measured += 1
        if expected > 0:
            outcome.ratio += min(10.0, max(0.0, gain.mean / scale_of(growth) / expected))

    def _outcome(self, blueprint: str) -> Outcome:
        return self.outcomes.setdefault(blueprint, Outcome())


def evaluation_of(state: SystemState) -> Evaluation | None:
    """Return the losses of a state; None when one is missing or not finite."""
    held = {} if state.growth is None else state.growth.held_out
    every = [*state.losses.values(), *held.values()]
    if not state.losses or not all(map(math.isfinite, every)):
        return None
    held_out = sum(held.values()) if held else None
    return Evaluation(state.epoch, state.step, sum(state.losses.values()), held_out)


def gap_of(evaluation: Evaluation) -> float | None:
    """Return the share of the held-out loss that is not training loss, -1 to 1."""
    if evaluation.held_out is None:
        return None
    size = abs(evaluation.held_out)
    if size == 0:
        return 0.0
    return max(-1.0, min(1.0, (evaluation.held_out - evaluation.training) / size))


def measured(gain: Gain | None) -> Gain | None:
    """Return a gain with a finite mean; its interval may be without end."""
    if gain is None or not math.isfinite(gain.mean):
        return None
    if math.isnan(gain.low) or math.isnan(gain.high):
        return None
    return gain


def scale_of(growth: GrowthState) -> float:
    """Return the size of the held-out loss, which shares are of."""
    size = abs(sum(growth.held_out.values()))
    return size if 0 < size < math.inf else 1.0


def is_structural(command: AdaptationCommand, growth: GrowthState) -> bool:
    """Whether a command changes the architecture: germinates, fossilises or culls."""
    if not isinstance(command, SeedCommand):
        return False
    if command.operation is SeedOperation.ADVANCE:
        seed = growth.seeds.get(command.seed)
        return seed is not None and seed.stage is Stage.HOLDING
    return command.operation in (SeedOperation.GERMINATE, SeedOperation.CULL)
