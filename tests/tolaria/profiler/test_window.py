import pytest
import torch.profiler
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerAction

from esper.leyline import ConfigError
from esper.tolaria.profiler import Phase, Window

counts = st.integers(0, 5)
ACTIONS = {
    ProfilerAction.NONE: Phase.WAIT,
    ProfilerAction.WARMUP: Phase.WARMUP,
    ProfilerAction.RECORD: Phase.ACTIVE,
    ProfilerAction.RECORD_AND_SAVE: Phase.ACTIVE,
}


@given(wait=counts, warmup=st.integers(1, 5), active=st.integers(1, 5), repeat=st.integers(1, 4))
def test_it_agrees_with_torchs_own_schedule(
    wait: int, warmup: int, active: int, repeat: int
) -> None:
    window = Window(wait, warmup, active, repeat)
    theirs = torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat)
    for position in range(window.length * repeat):
        action = theirs(position)
        assert window.phase(position) is ACTIONS[action]
        assert window.closes(position) is (action is ProfilerAction.RECORD_AND_SAVE)


@given(wait=counts, warmup=counts, active=st.integers(1, 5), repeat=st.integers(1, 4))
def test_it_ends_and_every_opening_has_its_closing(
    wait: int, warmup: int, active: int, repeat: int
) -> None:
    window = Window(wait, warmup, active, repeat)
    opened = closed = recorded = 0
    for position in range(window.length * repeat + 3):
        opened += window.opens(position)
        recorded += window.phase(position) is Phase.ACTIVE
        closed += window.closes(position)
        assert closed <= opened <= closed + 1
    assert opened == closed == repeat
    assert recorded == repeat * active
    assert window.phase(position) is Phase.DONE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wait": -1}, "wait of a profiler window is -1; give 0 or more"),
        ({"warmup": -2}, "warmup of a profiler window is -2; give 0 or more"),
        ({"active": 0}, "active of a profiler window is 0; give 1 or more"),
        ({"repeat": 0}, "repeat of a profiler window is 0; give 1 or more"),
    ],
)
def test_a_window_that_would_not_open_or_not_end_is_refused(
    arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Window(**arguments)
