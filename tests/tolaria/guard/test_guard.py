import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.core.config import ConservativeConfig, GuardConfig
from esper.leyline import Action, Tier
from esper.tolaria.guard import Guard, NullGuard


def settled(config: GuardConfig | None = None, loss: float = 1.0) -> Guard:
    guard = Guard(config)
    noise = random.Random(0)
    for step in range(100):
        assert guard.judge(step, loss * (1 + 0.05 * noise.gauss(0, 1))).action is Action.COMMIT
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_refused_from_the_first_step_on(bad: float) -> None:
    verdict = Guard().judge(0, bad)
    assert verdict.action is Action.SKIP
    assert verdict.suspicious
    assert str(bad) in verdict.reason


def test_a_non_finite_gradient_is_refused() -> None:
    assert Guard().judge(0, 1.0, math.nan).action is Action.SKIP
    assert Guard().judge(0, 1.0, None).action is Action.COMMIT


def test_non_finite_steps_in_a_row_roll_back() -> None:
    guard = settled()
    actions = [guard.judge(100 + i, math.nan).action for i in range(4)]
    assert actions == [Action.SKIP] * 3 + [Action.ROLLBACK]


def test_one_spike_is_skipped_and_two_in_a_row_roll_back() -> None:
    guard = settled()
    first = guard.judge(100, 50.0)
    assert first.action is Action.SKIP
    assert first.suspicious
    second = guard.judge(101, 60.0)
    assert second.action is Action.ROLLBACK
    assert second.first_suspect == 100
    assert second.before_step == 100 - GuardConfig().margin
    assert second.tier is Tier.MEMORY
    assert second.rate_factor == 1.0
    assert (second.rewarm_from, second.rewarm_steps) == (0.5, 100)


def test_a_verdict_names_the_series_and_the_values_that_led_to_it() -> None:
    guard = settled()
    guard.judge(100, 50.0)
    verdict = guard.judge(101, 60.0)
    assert verdict.signal == "loss"
    assert verdict.trigger["value"] == 60.0
    assert verdict.trigger["median"] == guard.total.statistics.median
    assert verdict.trigger["deviations"] > 10
    assert verdict.trigger["spikes_in_a_row"] == 2
    refused = Guard().judge(0, 1.0, math.inf)
    assert refused.signal == "gradient_norm"
    assert refused.trigger["gradient_norm"] == math.inf


def test_a_spike_followed_by_nan_rolls_back_at_once() -> None:
    guard = settled()
    guard.judge(100, 50.0)
    assert guard.judge(101, math.nan).action is Action.ROLLBACK


def test_a_lasting_rise_rolls_back_after_four_steps() -> None:
    guard = settled()
    actions = [guard.judge(100 + i, 1.28).action for i in range(4)]
    assert actions == [Action.COMMIT] * 3 + [Action.ROLLBACK]


def test_a_spike_stays_in_mind_until_the_loss_has_been_calm_for_a_while() -> None:
    guard = settled()
    guard.judge(100, 50.0)
    calm = [guard.judge(101 + i, 1.0) for i in range(8)]
    assert [verdict.suspicious for verdict in calm] == [True] * 7 + [False]
    assert all(verdict.action is Action.COMMIT for verdict in calm)


def test_damage_that_shows_late_is_traced_to_the_first_spike() -> None:
    guard = settled()
    guard.judge(100, 500.0)
    guard.judge(101, 1.0)
    guard.judge(102, 7.0)
    verdict = guard.judge(103, 7.0)
    assert verdict.action is Action.ROLLBACK
    assert verdict.first_suspect == 100


def test_one_giant_loss_does_not_blind_the_trend_rule() -> None:
    guard = settled()
    before = guard.total.statistics.average
    guard.judge(100, 1e6)
    for step in range(101, 120):
        guard.judge(step, 1.0)
    assert guard.total.statistics.average < 1.1 * before


def test_a_divergence_does_not_raise_the_bar() -> None:
    guard = settled(GuardConfig(spike_patience=50, trend_patience=50))
    before = guard.total.statistics.state_dict()
    for step in range(100, 130):
        guard.judge(step, 50.0)
    assert guard.total.statistics.state_dict() == before


def test_even_calm_losses_wait_while_there_is_a_suspicion() -> None:
    guard = settled()
    before = guard.total.statistics.state_dict()
    guard.judge(100, 50.0)
    for step in range(101, 108):
        guard.judge(step, 1.0)
    assert guard.total.statistics.state_dict() == before
    guard.judge(108, 1.0)
    assert guard.total.statistics.state_dict()["recent"][-9:] == [50.0] + [1.0] * 8


def test_a_suspicion_that_nothing_confirms_ends_after_a_window() -> None:
    guard = settled()
    verdicts = [guard.judge(100 + i, 1.28 if i % 5 == 0 else 1.0) for i in range(80)]
    assert all(verdict.action is Action.COMMIT for verdict in verdicts)
    assert verdicts[50].suspicious
    assert not any(verdict.suspicious for verdict in verdicts[70:])


def test_each_further_rollback_goes_further_back_and_then_training_halts() -> None:
    guard = settled()
    verdicts = []
    for attempt in range(4):
        step = 100 + 2 * attempt
        guard.judge(step, 50.0)
        verdicts.append(guard.judge(step + 1, 60.0))
        guard.note_recovered(step + 1)
    reach = [v.first_suspect - v.before_step for v in verdicts[:3]]
    assert [v.action for v in verdicts] == [Action.ROLLBACK] * 3 + [Action.HALT]
    assert reach == [8, 16, 32]
    assert [v.tier for v in verdicts[:3]] == [Tier.MEMORY, Tier.MEMORY, Tier.DISK]
    assert [v.rate_factor for v in verdicts[:3]] == [1.0, 0.5, 0.5]
    assert [v.rewarm_steps for v in verdicts[:3]] == [100, 0, 0]
    assert "max_rollbacks" in verdicts[3].reason


def test_a_long_healthy_stretch_restores_the_budget() -> None:
    guard = settled(GuardConfig(recovery_steps=10))
    guard.judge(100, 50.0)
    guard.judge(101, 60.0)
    guard.note_recovered(101)
    for step in range(102, 115):
        guard.judge(step, 1.0)
    assert guard.history.in_a_row == 0


def test_a_saved_guard_judges_as_the_original() -> None:
    guard = settled()
    guard.judge(100, 50.0)
    other = Guard()
    other.load_state_dict(guard.state_dict())
    other.history.load_state_dict(guard.history.state_dict())
    assert other.judge(101, 60.0) == guard.judge(101, 60.0)


def test_losses_at_or_below_zero_are_judged_too() -> None:
    guard = Guard()
    noise = random.Random(1)
    for step in range(100):
        assert guard.judge(step, -3 + 0.1 * noise.gauss(0, 1)).action is Action.COMMIT
    assert guard.judge(100, 20.0).suspicious
    assert guard.judge(101, 20.0).action is Action.ROLLBACK


def test_a_constant_loss_is_no_divergence() -> None:
    guard = Guard()
    assert all(guard.judge(step, 0.0).action is Action.COMMIT for step in range(100))


def calls(guard: Guard, losses: list[float], strictness: float) -> bool:
    """Return whether the guard calls a divergence when it is that strict from step 100 on."""
    guard.strictness = strictness
    verdicts = [guard.judge(100 + number, loss) for number, loss in enumerate(losses)]
    return verdicts[-1].action is Action.ROLLBACK


NEVER = 10**6


@pytest.mark.parametrize(
    ("config", "losses"),
    [
        pytest.param(GuardConfig(), [1.22] * 4, id="all together"),
        pytest.param(
            GuardConfig(spike_deviations=20.0, trend_patience=NEVER), [1.75] * 2, id="spike"
        ),
        pytest.param(
            GuardConfig(trend_deviations=20.0, spike_patience=NEVER), [1.75] * 4, id="trend in MADs"
        ),
        pytest.param(
            GuardConfig(trend_ratio=3.0, spike_patience=NEVER), [2.75] * 4, id="trend as a ratio"
        ),
    ],
)
def test_a_stricter_guard_calls_a_divergence_that_it_would_else_let_pass(
    config: GuardConfig, losses: list[float]
) -> None:
    assert not calls(settled(config), losses, 1.0)
    assert calls(settled(config), losses, 0.75)


def test_strictness_is_no_part_of_the_state() -> None:
    guard = settled()
    guard.strictness = 0.75
    other = Guard()
    other.load_state_dict(guard.state_dict())
    assert other.strictness == Guard().strictness == 1.0
    assert other.state_dict() == guard.state_dict()


def test_a_guard_that_is_switched_off_stays_so_however_strict() -> None:
    guard = NullGuard()
    assert guard.strictness == 1.0
    guard.strictness = 0.5
    assert guard.judge(0, math.nan).action is Action.COMMIT


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_the_same_noise_raises_no_alarm_in_conservative_mode_either(spread: float) -> None:
    for seed in range(100):
        guard, noise = Guard(), random.Random(seed)
        guard.strictness = ConservativeConfig().guard_factor
        for step in range(400):
            loss = (0.01 + 4 * math.exp(-step / 60)) * math.exp(spread * noise.gauss(0, 1))
            assert guard.judge(step, loss).action is Action.COMMIT


def test_in_conservative_mode_a_plateau_raises_fewer_alarms_than_one_in_20_000_steps() -> None:
    alarms, runs, steps = 0, 250, 400
    for seed in range(runs):
        guard, noise = Guard(), random.Random(seed)
        guard.strictness = ConservativeConfig().guard_factor
        losses = [math.exp(0.2 * noise.gauss(0, 1)) for _ in range(steps)]
        verdicts = (guard.judge(step, loss) for step, loss in enumerate(losses))
        alarms += any(verdict.action is Action.ROLLBACK for verdict in verdicts)
    assert alarms < runs * steps / 20_000


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.02, 0.2, 1.0]))
def test_log_normal_noise_around_a_falling_loss_raises_no_alarm(seed: int, spread: float) -> None:
    guard, noise = Guard(), random.Random(seed)
    for step in range(400):
        loss = (0.01 + 4 * math.exp(-step / 60)) * math.exp(spread * noise.gauss(0, 1))
        assert guard.judge(step, loss).action is Action.COMMIT
