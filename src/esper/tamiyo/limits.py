"""The thresholds of the growth rules."""

import dataclasses
import math
from dataclasses import dataclass, field

from esper.leyline import ConfigError
from esper.tamiyo.risk import RiskLimits

_WHOLE_FROM_ONE = (
    "window_epochs",
    "pending_epochs",
    "trend_evaluations",
    "least_evaluations",
    "steady_evaluations",
    "rung_evaluations",
    "training_evaluations",
    "holding_evaluations",
    "repeated_evaluations",
    "most_live",
)


@dataclass(frozen=True)
class RuleLimits:
    """What the rules compare with. Evaluations are those of the states that a policy is shown.

    A gain is compared with a price: the share of the held-out loss that a seed must take away for
    what it costs. What a blueprint can be expected to gain follows a power law of its size, until
    seeds of that blueprint have been measured (Hoffmann et al., "Training Compute-Optimal Large
    Language Models", 2022, find an exponent of 0.34).

    :param window_epochs: epochs from one structural change (a seed germinated, fossilised or
        culled) to the next.
    :param pending_epochs: epochs in which word is waited for of what was asked.
    :param trend_evaluations: newest evaluations that the slope is measured on; 5 at least.
    :param least_evaluations: evaluations before anything germinates.
    :param slow_progress: share by which the held-out loss falls in an epoch, below which progress
        is slow.
    :param under_fit_gap: share of the held-out loss that is not training loss, up to which the
        model is under-fitting.
    :param over_fit_gap: the same, from which on it is over-fitting; it stays so until the gap is
        under-fitting again.
    :param steady_evaluations: evaluations in a row that must speak for germination.
    :param most_live: seeds that grow at a time.
    :param training_steps: steps that a seed trains before it may blend.
    :param ramp_steps: steps that it needs to blend in; for the payback time.
    :param rung_evaluations: evaluations in a row with a gain below zero, beyond doubt, after which
        a seed in training is culled.
    :param training_evaluations: evaluations after which it is culled without a gain above zero.
    :param repeated_evaluations: evaluations in a row with a gain above its price after which a
        blended seed may stay, although its interval still includes zero.
    :param holding_evaluations: evaluations after which a blended seed is culled that may not stay.
    :param parameter_price: price of doubling the model's parameters.
    :param flop_price: price of two operations more per parameter of the model, which is what a
        forward pass of dense layers takes.
    :param expected_exponent: of the power law of a seed's expected gain.
    :param rate_factor: of a cut of the learning rate.
    :param most_cuts: such cuts in a run.
    :param cut_epochs: epochs from one cut to the next.
    :param risk: what mishaps count.
    :raises ConfigError: a limit is out of range.
    """

    window_epochs: int = 2
    pending_epochs: int = 3
    trend_evaluations: int = 6
    least_evaluations: int = 2
    slow_progress: float = 0.02
    under_fit_gap: float = 0.3
    over_fit_gap: float = 0.6
    steady_evaluations: int = 2
    most_live: int = 2
    training_steps: int = 100
    ramp_steps: int = 150
    rung_evaluations: int = 2
    training_evaluations: int = 5
    repeated_evaluations: int = 3
    holding_evaluations: int = 4
    parameter_price: float = 0.1
    flop_price: float = 0.0005
    expected_exponent: float = 0.3
    rate_factor: float = 0.5
    most_cuts: int = 3
    cut_epochs: int = 4
    risk: RiskLimits = field(default_factory=RiskLimits)

    def __post_init__(self) -> None:
        for name in _WHOLE_FROM_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more")
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ConfigError(f"{spec.name} is {value}; give a finite number from 0 on")
        if self.under_fit_gap > self.over_fit_gap:
            raise ConfigError(
                f"under_fit_gap is {self.under_fit_gap}, above over_fit_gap = {self.over_fit_gap}; "
                "give the smaller one for under-fitting"
            )
        if not 0 < self.rate_factor < 1:
            raise ConfigError(f"rate_factor is {self.rate_factor}; give a number between 0 and 1")
