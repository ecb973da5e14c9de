"""One series under watch: how far out its last values lie, and how many of them in a row."""

from enum import IntEnum
from typing import Any

from esper.core.config import GuardConfig
from esper.tolaria.guard.statistics import RobustStatistics

# While a declared change settles, a value is not far out below so many times the average.
_LENIENT_RATIO = 3.0


class Grade(IntEnum):
    """What a value says about training, from harmless to worst."""

    CALM = 0
    HIGH = 1
    SPIKE = 2
    DIVERGED = 3


class Monitor:
    """Grades the values of one series against its own past.

    A spike lies far above the median, in median absolute deviations (MAD). A high value lies well
    above the exponential average, and also clearly outside the noise. Either has to be higher than
    anything in the window: that is what tells a divergence from a series whose noise has long
    tails. Enough of them in a row are a divergence.

    :param signal: name of the series.
    :param config: thresholds.
    :param lasting: whether values that are far out are held back until the suspicion has proved
        wrong, so that a divergence cannot raise the bar it is measured with, nor ordinary noise be
        left out of the bar. Otherwise they enter at once, no number of them is a divergence, and
        there is none before the window is full.
    """

    def __init__(self, signal: str, config: GuardConfig, *, lasting: bool = True) -> None:
        self.signal = signal
        self.statistics = RobustStatistics(config.window)
        self.spikes = 0
        self.high = 0
        self._config = config
        self._lasting = lasting
        self._warmup = config.warmup if lasting else config.window
        self._value = self._distance = 0.0
        self._held: list[float] = []

    def observe(self, value: float, strictness: float, hold: bool, lenient: bool) -> Grade:
        """Grade the next value of the series.

        :param value: finite.
        :param strictness: the thresholds are multiplied by this, ``trend_ratio`` by its excess
            over 1.
        :param hold: keep even a calm value out of the statistics for now.
        :param lenient: a declared change settles.
        """
        statistics = self.statistics
        # The deviation is the costly part: it is not needed for a value that is no new high.
        if (
            value > statistics.highest
            and statistics.count >= self._warmup
            and not (lenient and value <= _LENIENT_RATIO * statistics.average)
        ):
            grade = self._grade(value, strictness)
            if grade and self._lasting:
                self._held.append(value)
                return grade
        else:
            grade = Grade.CALM
            self.spikes = self.high = 0
        if hold and self._lasting:
            self._held.append(value)
        else:
            statistics.add(value)
        return grade

    def release(self) -> None:
        """Take in what was held back: the suspicion was wrong."""
        self.spikes = self.high = 0
        for value in self._held:
            self.statistics.add(value, self._config.trend_ratio * self.statistics.average)
        self._held.clear()

    def forget(self) -> None:
        """Drop what was held back: it has been taken back."""
        self.spikes = self.high = 0
        self._held.clear()

    def restart(self) -> None:
        """Forget everything: what the series measures has changed."""
        self.forget()
        self.statistics = RobustStatistics(self._config.window)

    def reason(self) -> str:
        """Return one sentence with the values of the last grade above calm."""
        statistics, name = self.statistics, self.signal.replace("_", " ")
        return (
            f"{name} {self._value:.4g} lies {self._distance:.3g} MADs above the median of "
            f"{statistics.median:.4g}; the average is {statistics.average:.4g}"
        )

    def trigger(self) -> dict[str, float]:
        """Return the values of the last grade above calm by name."""
        return {
            "value": self._value,
            "median": self.statistics.median,
            "average": self.statistics.average,
            "highest": self.statistics.highest,
            "deviations": self._distance,
            "spikes_in_a_row": self.spikes,
            "high_in_a_row": self.high,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return statistics, counts and what is held back."""
        return {
            "statistics": self.statistics.state_dict(),
            "in_a_row": [self.spikes, self.high],
            "held": list(self._held),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self.statistics.load_state_dict(state_dict["statistics"])
        self.spikes, self.high = state_dict["in_a_row"]
        self._held = list(state_dict["held"])

    def _grade(self, value: float, strictness: float) -> Grade:
        config, statistics = self._config, self.statistics
        self._value, self._distance = value, statistics.distance(value)
        spiked = self._distance > strictness * config.spike_deviations
        self.spikes = self.spikes + 1 if spiked else 0
        raised = value > (1 + strictness * (config.trend_ratio - 1)) * statistics.average
        high = raised and self._distance > strictness * config.trend_deviations
        self.high = self.high + 1 if high else 0
        if not self._lasting:
            return Grade.SPIKE if spiked else Grade.CALM
        if self.spikes >= config.spike_patience or self.high >= config.trend_patience:
            return Grade.DIVERGED
        if spiked:
            return Grade.SPIKE
        return Grade.HIGH if high else Grade.CALM
