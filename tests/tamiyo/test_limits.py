from typing import Any

import pytest

from esper.leyline import ConfigError
from esper.tamiyo import BanditLimits, RiskLimits, RuleLimits


@pytest.mark.parametrize(
    "bad",
    [
        {"window_epochs": 0},
        {"slow_progress": float("nan")},
        {"parameter_price": -0.1},
        {"rate_factor": 1.0},
        {"rate_factor": 0.0},
        {"under_fit_gap": 0.7},
    ],
)
def test_rule_limits_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RuleLimits(**bad)


@pytest.mark.parametrize("bad", [{"horizon": 0}, {"noise": 0.0}, {"floor": 1.5}, {"seed": -1}])
def test_bandit_limits_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        BanditLimits(**bad)


@pytest.mark.parametrize("bad", [{"half_life_steps": 0.0}, {"cull": -1.0}])
def test_risk_limits_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RiskLimits(**bad)
