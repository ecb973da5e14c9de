"""What the bandit sees of a state: ten numbers of about the same size."""

import math

import numpy as np
from numpy.typing import NDArray

from esper.leyline import GrowthState, Stage
from esper.tamiyo.view import View

FEATURES = (
    "bias",
    "progress",
    "doubt",
    "gap",
    "under_fitting",
    "budget_left",
    "time_left",
    "live",
    "concentration",
    "conflict",
)


def features(view: View) -> NDArray[np.float64]:
    """Return the features of a state, each from -1 to 1, in the order of ``FEATURES``.

    ``progress`` is the share by which the held-out loss falls in an epoch, ``doubt`` half the width
    of its interval (1 without one), ``gap`` that between held-out and training loss,
    ``under_fitting`` whether the rules call it that, ``budget_left`` the share of the parameter
    budget (1 without one), ``time_left`` the share of the run's steps, ``live`` the share of slots
    in which a seed grows, ``concentration`` the largest residual's share of all, and ``conflict``
    the mean share of conflicting pairs of tasks. What was not measured is 0.
    """
    state, growth = view.state, view.growth
    slope, doubt = _trend(view)
    residuals = [seed.residual or 0.0 for _, seed, _ in view.seeds(*Stage)]
    values = (
        1.0,
        slope,
        doubt,
        view.gap or 0.0,
        float(view.memory.fit == "under"),
        _budget_left(growth),
        _time_left(state.step, growth.steps_left),
        view.live / max(1, len(growth.seeds)),
        max(residuals, default=0.0) / (sum(residuals) or 1.0),
        state.conflict_share or 0.0,
    )
    bounded = [max(-1.0, min(1.0, value)) if math.isfinite(value) else 0.0 for value in values]
    return np.asarray(bounded, dtype=np.float64)


def _trend(view: View) -> tuple[float, float]:
    trend = view.trend
    if trend is None:
        return 0.0, 1.0
    width = (trend.high - trend.low) / 2
    return trend.slope, width if math.isfinite(width) else 1.0


def _budget_left(growth: GrowthState) -> float:
    budget = growth.parameter_budget
    return 1.0 - growth.parameters / budget if budget else 1.0


def _time_left(step: int, left: int | None) -> float:
    planned = step + (left or 0)
    return (left or 0) / planned if planned else 1.0
