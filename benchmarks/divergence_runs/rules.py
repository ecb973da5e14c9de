"""Rules that call a divergence: Esper's guard, and others written from their descriptions."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, pstdev
from typing import NamedTuple, Protocol

from esper.core.config import GuardConfig
from esper.leyline import Action
from esper.tolaria import Guard
from esper.tolaria.guard import RobustStatistics


class Seen(NamedTuple):
    """What a rule gets to see of a step."""

    loss: float
    norm: float
    losses: Mapping[str, float]


class Rule(Protocol):
    """Sees one step after the other."""

    def alarms(self, seen: Seen) -> bool:
        """Whether the rule would act on this step."""
        ...


class Esper:
    """The guard with its defaults; a skipped update counts as an alarm, too.

    :param skips: whether it does.
    :param linear: compare the total loss on a linear scale, and nothing else.
    """

    def __init__(self, *, skips: bool = True, linear: bool = False) -> None:
        config = GuardConfig(max_rollbacks=10**9, skip_budget=10**9)
        self._guard, self._linear, self._step = Guard(config), linear, 0
        self._harmless = {Action.COMMIT} if skips else {Action.COMMIT, Action.SKIP}
        if linear:
            self._guard.total.statistics = LinearStatistics(config.window)

    def alarms(self, seen: Seen) -> bool:
        if self._linear:
            verdict = self._guard.judge(self._step, seen.loss)
        else:
            verdict = self._guard.judge(self._step, *seen)
        if verdict.action is Action.ROLLBACK:
            self._guard.note_recovered(self._step)
        self._step += 1
        return verdict.action not in self._harmless


class LinearStatistics(RobustStatistics):
    """The same statistics with distances on a linear scale."""

    def distance(self, value: float) -> float:
        center = self.median
        distances = sorted(abs(other - center) for other in self._sorted)
        smallest = max(0.01 * abs(center), 1e-30)
        return (value - center) / max(distances[len(distances) // 2], smallest)


class Lightning:
    """SpikeDetection: not finite, or three times the mean of the last ten losses."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=10)

    def alarms(self, seen: Seen) -> bool:
        mean = fmean(self._last) if self._last else math.inf
        spike = not math.isfinite(seen.loss) or seen.loss - mean >= 2.0 * abs(mean)
        if not spike:
            self._last.append(seen.loss)
        return spike


class NaNMonitor:
    """Composer's: a loss that is not a number."""

    def alarms(self, seen: Seen) -> bool:
        return math.isnan(seen.loss)


class KillLossSpike:
    """llm-foundry's: twice the mean of 100 losses more than four times in a row, or too high.

    Too high is half of the window above 10, once two windows have passed.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=100)
        self._outliers = self._steps = 0

    def alarms(self, seen: Seen) -> bool:
        self._steps += 1
        killed = False
        if len(self._last) == 100:
            self._outliers = self._outliers + 1 if seen.loss >= 2.0 * fmean(self._last) else 0
            killed = self._outliers > 4
            if self._steps > 200:
                killed = killed or sum(value > 10.0 for value in self._last) >= 50
        self._last.append(seen.loss)
        return killed


class SkipStep:
    """OLMo-core's: loss or gradient norm six standard deviations above the mean of 128."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=128)
        self._norms: deque[float] = deque(maxlen=128)

    def alarms(self, seen: Seen) -> bool:
        spikes = [_beyond(seen.loss, self._losses), _beyond(seen.norm, self._norms)]
        self._losses.append(seen.loss)
        self._norms.append(seen.norm)
        return any(spikes)


def _beyond(value: float, last: deque[float]) -> bool:
    if len(last) < 64:
        return False
    if not all(math.isfinite(other) for other in last):
        return False
    scale = max(map(abs, last)) or 1.0
    spread = scale * pstdev([other / scale for other in last])
    return not value <= fmean(last) + 6 * spread


class ZClip:
    """The z-score of the gradient norm above 2.5, with exponential averages; it then clips."""

    def __init__(self) -> None:
        self._warm: list[float] = []
        self._mean = self._variance = 0.0

    def alarms(self, seen: Seen) -> bool:
        norm = seen.norm
        if len(self._warm) < 25:
            self._warm.append(norm)
            self._mean, self._variance = fmean(self._warm), pstdev(self._warm) ** 2
            return False
        spread = math.sqrt(self._variance) + 1e-6
        z = (norm - self._mean) / spread
        clipped = not z <= 2.5
        if clipped and math.isfinite(z):
            norm = self._mean + 2.5**2 / z * spread
        if math.isfinite(norm):
            self._mean = 0.97 * self._mean + 0.03 * norm
            self._variance = 0.97 * self._variance + 0.03 * (norm - self._mean) ** 2
        return clipped


RULES: dict[str, Callable[[], Rule]] = {
    "Esper": Esper,
    "Esper, rollbacks alone": lambda: Esper(skips=False),
    "Esper's rules on a linear scale, loss alone": lambda: Esper(linear=True),
    "Lightning, SpikeDetection": Lightning,
    "Composer, NaNMonitor": NaNMonitor,
    "llm-foundry, KillLossSpike": KillLossSpike,
    "OLMo-core, SkipStep": SkipStep,
    "ZClip": ZClip,
}
