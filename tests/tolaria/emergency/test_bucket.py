import pytest

from esper.tolaria.emergency import TokenBucket


def test_a_minutes_worth_is_there_at_once_and_then_a_steady_trickle() -> None:
    now = 0.0
    bucket = TokenBucket(6, clock=lambda: now)
    assert [bucket.take() for _ in range(8)] == [True] * 6 + [False] * 2
    now = 9.9
    assert not bucket.take()
    now = 10.1
    assert bucket.take()
    assert not bucket.take()
    now = 10_000.0
    assert [bucket.take() for _ in range(8)] == [True] * 6 + [False] * 2


def test_a_rate_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="per_minute is 0"):
        TokenBucket(0)
