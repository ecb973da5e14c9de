import math

from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.profiler.slow import SlowSteps


def learnt(slow: SlowSteps, step: int, milliseconds: float, steps: int = 32) -> int:
    for _ in range(steps):
        assert not slow.judge(step, milliseconds)
        step += 1
    slow.learn(step)
    return step


def test_some_slow_steps_in_a_row_raise_the_alarm_once() -> None:
    slow = SlowSteps(factor=3.0, patience=3, cooldown=100)
    step = learnt(slow, 0, 20.0)
    assert slow.limit_ms == 60.0
    assert [slow.judge(step + i, 70.0) for i in range(3)] == [False, False, True]
    # Now that is what a usual step takes.
    step = learnt(slow, step + 3, 70.0)
    assert slow.limit_ms == math.inf, "it cools down"
    slow.learn(step + 100)
    assert slow.limit_ms == 210.0
    assert slow.alarms == 1


def test_single_slow_steps_are_no_alarm() -> None:
    slow = SlowSteps(factor=3.0, patience=2, cooldown=100)
    step = learnt(slow, 0, 20.0)
    for _ in range(10):
        assert not slow.judge(step, 1000.0)
        assert slow.suspicious
        assert not slow.judge(step + 1, 20.0)
        step += 2
    slow.learn(step)
    assert slow.limit_ms == 60.0


def test_nothing_is_called_slow_before_enough_is_known() -> None:
    slow = SlowSteps(factor=3.0, patience=1, cooldown=1)
    step = learnt(slow, 0, 1.0, steps=15)
    assert not slow.judge(step, 1e6)


@given(st.lists(st.floats(0.1, 10.0), min_size=100, max_size=200))
def test_short_steps_may_vary_as_they_like(timings: list[float]) -> None:
    slow = SlowSteps(factor=1.5, patience=1, cooldown=1)
    for step, milliseconds in enumerate(timings):
        assert not slow.judge(step, milliseconds)
        slow.learn(step)


def test_an_infinite_factor_turns_it_off() -> None:
    slow = SlowSteps(factor=math.inf, patience=1, cooldown=1)
    step = learnt(slow, 0, 20.0)
    assert not slow.judge(step, 1e9)
