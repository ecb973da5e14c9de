"""What holds for any ramp."""

from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.ramp import Ramp

SHARES = st.floats(0.0, 1.0)
RAMPS = st.builds(
    Ramp,
    SHARES,
    SHARES,
    st.integers(1, 10**7),
    st.sampled_from(["linear", "cosine", "sigmoid"]),
)


@given(RAMPS, st.integers(-3, 10**7 + 3), st.integers(0, 1000))
def test_a_ramp_never_turns_round_and_stays_between_its_ends(
    ramp: Ramp, step: int, later: int
) -> None:
    now, then = ramp.value(step), ramp.value(step + later)
    assert now <= then if ramp.start <= ramp.target else now >= then
    low, high = sorted((ramp.start, ramp.target))
    assert low <= now <= high


@given(RAMPS, st.integers(0, 10**9))
def test_both_ends_are_exact(ramp: Ramp, beyond: int) -> None:
    assert ramp.value(-beyond) == ramp.start
    assert ramp.value(ramp.steps + beyond) == ramp.target


@given(SHARES, st.integers(1, 1000), st.sampled_from(["linear", "cosine", "sigmoid"]))
def test_the_way_down_is_the_way_up_mirrored(share: float, steps: int, curve: str) -> None:
    up, down = Ramp(0.0, share, steps, curve), Ramp(share, 0.0, steps, curve)
    for step in (0, steps // 3, steps // 2, steps):
        assert abs(up.value(step) + down.value(step) - share) < 1e-12
