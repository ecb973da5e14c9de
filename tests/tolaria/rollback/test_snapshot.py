import marshal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.leyline import StateError
from esper.tolaria.rollback import FastRollbackCache, snapshot_bytes
from esper.tolaria.state import Capture


class Numbers:
    """A state of one tensor and one value."""

    def __init__(self, size: int = 1000) -> None:
        self.tensor = torch.zeros(size)
        self.value = 0

    def set(self, value: int) -> None:
        self.tensor.fill_(value)
        self.value = value

    def capture(self) -> Capture:
        return Capture({"tensor": self.tensor}, {"value": self.value})

    def restore(self, capture: Capture, *, keep: object = ()) -> None:
        self.tensor.copy_(capture.tensors["tensor"])
        self.value = capture.values["value"]


def test_bytes_are_counted_exactly_also_when_a_step_is_replaced() -> None:
    cache, state = FastRollbackCache(1), Numbers()
    cache.put(1, state)
    one = cache.size_bytes
    assert one == snapshot_bytes(state) + len(marshal.dumps({"value": 0}))
    cache.put(1, state)
    assert cache.size_bytes == one
    cache.put(2, state)
    assert cache.size_bytes == 2 * one


def test_memory_is_used_again_once_slots_are_taken() -> None:
    cache, state = FastRollbackCache(1, max_snapshots=2), Numbers()
    pointers = set()
    for step in range(10):
        snapshot = cache.put(step, state)
        assert snapshot is not None
        pointers.add(snapshot.capture().tensors["tensor"].data_ptr())
    assert len(pointers) == 2


def test_the_last_healthy_snapshot_outlives_doubtful_ones() -> None:
    cache, state = FastRollbackCache(1, max_snapshots=2), Numbers()
    state.set(1)
    cache.put(1, state)
    for step in range(2, 9):
        state.set(step)
        cache.put(step, state, healthy=False)
    nearest = cache.get_nearest(100)
    assert nearest is not None
    cache.restore(nearest, state)
    assert state.value == 1


def test_a_doubtful_snapshot_does_not_displace_the_only_healthy_one() -> None:
    state = Numbers()
    cache = FastRollbackCache(snapshot_bytes(state) * 1.5 / 2**20)
    cache.put(1, state)
    assert cache.put(2, state, healthy=False) is None
    assert cache.put(3, state) is not None
    assert cache.steps == [3]


def test_a_state_over_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(StateError, match=r"snapshots\.max_megabytes"):
        FastRollbackCache(0.001).put(0, Numbers())


def test_restoring_drops_later_snapshots() -> None:
    cache, state = FastRollbackCache(1), Numbers()
    for step in range(5):
        cache.put(step, state)
    snapshot = cache.get_nearest(2)
    assert snapshot is not None
    cache.restore(snapshot, state)
    assert cache.steps == [0, 1, 2]
    cache.discard_after(0)
    assert cache.steps == [0]


@given(
    dtype=st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    ),
    shape=st.lists(st.integers(0, 4), max_size=3),
)
def test_every_dtype_and_shape_survives(dtype: torch.dtype, shape: list[int]) -> None:
    class One(Numbers):
        def __init__(self) -> None:
            self.tensor = torch.randint(0, 2, shape).to(dtype)
            self.value = 0

    state = One()
    expected = state.tensor.clone()
    cache = FastRollbackCache(1)
    snapshot = cache.put(0, state)
    assert snapshot is not None
    state.tensor.zero_()
    cache.restore(snapshot, state)
    assert torch.equal(state.tensor, expected)


class CacheMachine(RuleBasedStateMachine):
    """Whatever is put in, the budget holds and the newest healthy state can be restored."""

    def __init__(self) -> None:
        super().__init__()
        self.state = Numbers(64)
        self.budget = snapshot_bytes(self.state) * 3 + 200
        self.cache = FastRollbackCache(self.budget / 2**20, max_snapshots=5)
        self.step = 0
        self.last_healthy: int | None = None

    @rule(healthy=st.booleans(), ahead=st.integers(0, 3))
    def put(self, healthy: bool, ahead: int) -> None:
        self.step += ahead
        self.state.set(self.step)
        if self.cache.put(self.step, self.state, healthy=healthy) is not None:
            if healthy:
                self.last_healthy = self.step
            elif self.last_healthy == self.step:
                nearest = self.cache.get_nearest(self.step)
                self.last_healthy = nearest.step if nearest else None

    @precondition(lambda self: self.last_healthy is not None)
    @rule()
    def restore(self) -> None:
        snapshot = self.cache.get_nearest(self.step)
        assert snapshot is not None
        assert snapshot.step == self.last_healthy
        self.cache.restore(snapshot, self.state)
        self.step = self.state.value
        assert self.step == self.last_healthy
        assert bool((self.state.tensor == self.step).all())

    @invariant()
    def within_budget(self) -> None:
        assert self.cache.size_bytes <= self.budget
        assert len(self.cache.steps) <= 5


TestCacheMachine = CacheMachine.TestCase


def test_a_held_snapshot_keeps_its_content_whatever_comes_after() -> None:
    state = Numbers()
    cache = FastRollbackCache(1, max_snapshots=2)
    state.set(1)
    first = cache.put(1, state)
    assert first is not None
    with pytest.raises(RuntimeError, match="released but not held"):
        first.release()
    first.hold().hold()
    for step in range(1, 9):
        state.set(step + 10)
        newest = cache.put(step, state)
        assert newest is not None
        assert cache.size_bytes == first.nbytes + newest.nbytes
    assert bool((first.capture().tensors["tensor"] == 1).all())
    assert first.capture().values == {"value": 1}
    first.release()
    first.release()
    assert not first.held


def test_memory_that_is_still_read_counts_and_is_not_given_away() -> None:
    state = Numbers()
    cache = FastRollbackCache(snapshot_bytes(state) * 1.5 / 2**20)
    first = cache.put(1, state)
    assert first is not None
    first.hold()
    for step in (1, 2):
        assert cache.put(step, state) is None, "the only slot is being read"
    assert cache.size_bytes == first.nbytes
    first.release()
    second = cache.put(3, state)
    assert second is not None
    assert second.capture().tensors["tensor"].data_ptr() == (
        first.capture().tensors["tensor"].data_ptr()
    )


def test_how_long_a_restore_takes_is_predicted_from_the_last_copy() -> None:
    state = Numbers(4_000_000)
    cache = FastRollbackCache(64)
    cache.put(1, state)
    snapshot = cache.put(1, state)
    assert snapshot is not None
    assert 0.1 < cache.predict_ms(snapshot) < 1000
