"""What is judged besides the total loss: each task, the gradient norm; and declared changes."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.core.config import GuardConfig
from esper.leyline import Action, Verdict
from esper.tolaria.guard import Guard, NullGuard

NOISE = random.Random()


@pytest.fixture(autouse=True)
def _same_noise() -> None:
    NOISE.seed(0)


def noisy(value: float) -> float:
    return value * (1 + 0.05 * NOISE.gauss(0, 1))


def settled(config: GuardConfig | None = None) -> Guard:
    """A guard that has seen two tasks, one a hundred times the other, and their gradient."""
    guard = Guard(config)
    for step in range(100):
        assert two(guard, step).action is Action.COMMIT
    return guard


def two(guard: Guard, step: int, small: float = 0.1, norm: float = 1.0) -> Verdict:
    losses = {"large": noisy(10.0), "small": noisy(small)}
    return guard.judge(step, sum(losses.values()), noisy(norm), losses)


def test_a_task_that_diverges_is_seen_though_the_total_hardly_moves() -> None:
    guard = settled()
    verdicts = [two(guard, 100 + i, small=0.5) for i in range(2)]
    assert [v.action for v in verdicts] == [Action.SKIP, Action.ROLLBACK]
    assert verdicts[1].signal == "loss.small"
    assert "loss.small" in verdicts[1].reason


def test_a_gradient_that_is_far_out_is_skipped_and_takes_nothing_back() -> None:
    guard = settled()
    verdict = two(guard, 100, norm=50.0)
    assert verdict.action is Action.SKIP
    assert verdict.suspicious
    assert verdict.signal == "gradient_norm"
    assert "gradient norm" in verdict.reason
    actions = {two(guard, 101 + i, norm=50.0).action for i in range(200)}
    assert Action.ROLLBACK not in actions
    assert not two(guard, 301, norm=50.0).suspicious, "the new level is the normal one"


def test_gradients_that_keep_rising_are_skipped_three_times_in_a_row_only() -> None:
    guard = settled()
    actions = [two(guard, 100 + i, norm=10.0 ** (2 + i)).action for i in range(5)]
    assert actions == [Action.SKIP] * 3 + [Action.COMMIT] * 2


def test_skipped_updates_have_a_budget_within_a_window_of_steps() -> None:
    guard = settled(GuardConfig(skip_budget=2, recovery_steps=200))
    actions = [
        two(guard, 100 + i, norm=10.0 ** (2 + i // 50) if i % 50 == 0 else 1.0).action
        for i in range(251)
    ]
    assert [i for i, action in enumerate(actions) if action is Action.SKIP] == [0, 50, 200, 250]


def test_the_budget_of_skips_is_not_taken_back() -> None:
    guard = settled(GuardConfig(skip_budget=1))
    state = guard.state_dict()
    assert two(guard, 100, norm=50.0).action is Action.SKIP
    guard.load_state_dict(state)
    assert two(guard, 100, norm=50.0).action is Action.COMMIT


def test_a_batch_without_a_task_is_judged_by_the_tasks_it_has() -> None:
    guard = settled()
    only_small = [guard.judge(100 + i, 0.1, 90.0, {"small": noisy(0.1)}) for i in range(50)]
    only_large = [guard.judge(150 + i, 10.0, 90.0, {"large": noisy(10.0)}) for i in range(50)]
    assert {verdict.action for verdict in only_small + only_large} == {Action.COMMIT}
    assert two(guard, 200) == two(guard, 201), "the total has not moved"
    assert guard.judge(202, 5.0, 90.0, {"small": 5.0}).signal == "loss.small"


def test_a_task_that_joins_makes_the_total_start_anew() -> None:
    guard = Guard()
    for step in range(100):
        guard.judge(step, 0.1, 1.0, {"small": noisy(0.1)})
    assert len(guard.tasks) == 1
    assert guard.total.statistics.count == 64
    actions = {two(guard, 100 + i, norm=9.0).action for i in range(60)}
    assert actions == {Action.COMMIT}
    assert guard.tasks["large"].statistics.count == 60


def test_one_task_alone_is_the_total_and_is_not_judged_twice() -> None:
    guard = Guard()
    for step in range(50):
        guard.judge(step, 1.0, None, {"loss": 1.0})
    assert guard.tasks["loss"].statistics.count == 0


def test_the_state_of_another_set_of_tasks_can_be_loaded() -> None:
    guard, other = settled(), Guard()
    for step in range(50):
        other.judge(step, 3.0, 1.0, {"a": 1.0, "b": 1.0, "c": 1.0})
    other.load_state_dict(guard.state_dict())
    assert list(other.tasks) == ["large", "small"]
    other.judge(100, 3.0, 1.0, {"a": 1.0, "b": 1.0})
    assert set(other.tasks) == {"large", "small", "a", "b"}


steps = st.lists(
    st.tuples(
        st.sampled_from([0.1, 0.12, 0.4, 5.0, math.nan]),
        st.sampled_from([1.0, 1.1, 40.0, math.inf]),
        st.booleans(),
    ),
    max_size=60,
)


@given(before=steps, after=steps, pause=st.integers(0, 40))
def test_a_saved_guard_judges_as_the_original(
    before: list[tuple[float, float, bool]], after: list[tuple[float, float, bool]], pause: int
) -> None:
    guard, other = Guard(GuardConfig(warmup=8)), Guard(GuardConfig(warmup=8))
    for step in range(20):
        guard.judge(step, 10.1, 1.0, {"small": 0.1 + step % 3 / 100, "large": 10.0})
    guard.pause(pause, "test")

    def judge(judging: Guard, step: int, values: tuple[float, float, bool]) -> Verdict:
        small, norm, both = values
        losses = {"small": small, "large": 10.0} if both else {"small": small}
        return judging.judge(step, sum(losses.values()), norm, losses)

    for number, values in enumerate(before):
        judge(guard, 20 + number, values)
    other.load_state_dict(guard.state_dict())
    other.history.load_state_dict(guard.history.state_dict())
    for number, values in enumerate(after):
        mine, theirs = judge(guard, 200 + number, values), judge(other, 200 + number, values)
        assert str(mine) == str(theirs)
    # As text: a value that is not a number equals nothing.
    assert str(other.state_dict()) == str(guard.state_dict())


def test_a_declared_change_lifts_the_bar_for_a_while() -> None:
    guard = settled()
    guard.pause(40, "learning rate 0.1 -> 0.2")
    assert {two(guard, 100 + i, small=0.16, norm=2.0).action for i in range(40)} == {Action.COMMIT}
    assert {two(guard, 140 + i, small=0.16, norm=2.0).action for i in range(40)} == {Action.COMMIT}
    assert two(guard, 200, small=1.6).action is Action.SKIP


def test_a_declared_change_excuses_neither_giants_nor_what_is_not_finite() -> None:
    guard = settled()
    guard.pause(40, "growth")
    assert guard.judge(100, math.nan).action is Action.SKIP
    guard.judge(101, 1e6)
    verdict = guard.judge(102, 1e6)
    assert verdict.action is Action.ROLLBACK
    assert "while this settles: growth" in verdict.reason


def test_a_shorter_pause_does_not_end_a_longer_one() -> None:
    guard = settled()
    guard.pause(40, "long")
    guard.pause(3, "short")
    assert guard.state_dict()["pause"] == [40, "long"]
    NullGuard().pause(3, "nothing")


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_noise_of_two_tasks_and_a_gradient_takes_nothing_back(spread: float) -> None:
    skipped = 0
    for seed in range(40):
        guard, noise = Guard(), random.Random(seed)
        for step in range(400):
            level = 0.01 + 4 * math.exp(-step / 60)
            losses = {task: level * math.exp(spread * noise.gauss(0, 1)) for task in "ab"}
            norm = level * math.exp(spread * noise.gauss(0, 1))
            verdict = guard.judge(step, sum(losses.values()), norm, losses)
            assert verdict.action in (Action.COMMIT, Action.SKIP)
            skipped += verdict.action is Action.SKIP
    assert skipped <= 1
