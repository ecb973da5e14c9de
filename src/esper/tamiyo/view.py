"""One state with everything that the rules look at, and how they tell why."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from esper.leyline import (
    AdaptationCommand,
    Explanation,
    GrowthState,
    SeedState,
    Stage,
    SystemState,
)
from esper.tamiyo.limits import RuleLimits
from esper.tamiyo.memory import Evaluation, Memory, Watch, evaluation_of, gap_of, scale_of
from esper.tamiyo.risk import Risk
from esper.tamiyo.trend import Trend

LIVE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})
_EMPTY = GrowthState(version=0, seeds={}, parameters=0)


@dataclass(frozen=True)
class View:
    """What the rules are shown.

    :param state: the newest one.
    :param memory: which has taken it in, unless it is stale.
    :param limits: to compare with.
    :param risk: what went wrong lately.
    """

    state: SystemState
    memory: Memory
    limits: RuleLimits
    risk: Risk

    @cached_property
    def growth(self) -> GrowthState:
        """The growing model; one without slots where nothing grows it."""
        return self.state.growth or _EMPTY

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The losses; None when one is missing or not finite."""
        return evaluation_of(self.state)

    @cached_property
    def gap(self) -> float | None:
        """The share of the held-out loss that is not training loss."""
        return None if self.evaluation is None else gap_of(self.evaluation)

    @cached_property
    def trend(self) -> Trend | None:
        """By which share the held-out loss falls in an epoch."""
        return self.memory.trend(self.limits)

    @cached_property
    def scale(self) -> float:
        """The size of the held-out loss."""
        return scale_of(self.growth)

    @cached_property
    def window_left(self) -> int:
        """Epochs until the next structural change may be asked for."""
        return self.memory.window_left(self.state.epoch, self.limits)

    @cached_property
    def live(self) -> int:
        """The number of seeds that grow, those on their way out included."""
        return sum(seed.stage in LIVE for seed in self.growth.seeds.values())

    def seeds(self, *stages: Stage) -> Iterator[tuple[str, SeedState, Watch]]:
        """Yield by name the seeds in one of these stages, with what was seen of them.

        Those that fade out after a cull are left out: nothing is to be decided about them.
        """
        for name, seed in sorted(self.growth.seeds.items()):
            if seed.stage in stages and not seed.fading:
                yield name, seed, self.memory.watches.get(name) or Watch(seed.stage)


Found = AdaptationCommand | Explanation
Rule = Callable[[View], Iterator[Found]]


def why(
    rule: str,
    reason: str,
    values: Mapping[str, float | None],
    thresholds: Mapping[str, float],
    otherwise: str,
) -> Explanation:
    """Return an explanation; values that are not finite or were not measured are left out."""
    finite = {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
    return Explanation(rule, reason, finite, dict(thresholds), otherwise)


def several(count: float, noun: str) -> str:
    """Return a number with its noun."""
    return f"{count:.0f} {noun}" if round(count) == 1 else f"{count:.0f} {noun}s"


def above(name: str, value: float | None, threshold: float) -> str:
    """Say what a value that has to rise lacks, or by how much it is there."""
    return _compared(name, value, threshold, "above")


def below(name: str, value: float | None, threshold: float) -> str:
    """Say what a value that has to fall lacks, or by how much it is there."""
    return _compared(name, value, threshold, "below")


def _compared(name: str, value: float | None, threshold: float, side: str) -> str:
    if value is None:
        return f"{name} {side} {threshold:.4g} (it was not measured)"
    if not math.isfinite(value):
        return f"{name} {side} {threshold:.4g} (it has no bound yet)"
    return f"{name} {side} {threshold:.4g} (it is {value:.4g}, {abs(threshold - value):.3g} away)"
