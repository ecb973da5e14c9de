import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from esper.core.breaker import BreakerState, CircuitBreaker, Permit
from esper.core.config import BreakerConfig

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
Change = tuple[BreakerState, BreakerState]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def permit_of(breaker: CircuitBreaker) -> Permit:
    permit = breaker.admit()
    assert permit is not None
    return permit


def fail(breaker: CircuitBreaker, times: int = 1, error: str = "") -> None:
    for _ in range(times):
        breaker.settle(permit_of(breaker), False, error)


def opened(clock: Clock, **rest: Any) -> CircuitBreaker:
    breaker = CircuitBreaker("tamiyo", clock=clock, **rest)
    fail(breaker, 3)
    return breaker


def test_calls_pass_while_nothing_is_wrong() -> None:
    breaker = CircuitBreaker("tamiyo", clock=Clock())
    for _ in range(10):
        breaker.settle(permit_of(breaker), True)
    assert (breaker.state, breaker.opened_total, breaker.retry_in_s) == (CLOSED, 0, 0.0)
    assert breaker.last_error == ""


def test_failures_in_a_row_open_it_and_keep_calls_out_for_the_cooldown() -> None:
    clock = Clock()
    breaker = CircuitBreaker("tamiyo", clock=clock)
    fail(breaker, 2)
    assert breaker.state is CLOSED
    fail(breaker, 1, "no answer")
    assert (breaker.state, breaker.opened_total) == (OPEN, 1)
    assert (breaker.failures_in_a_row, breaker.last_error) == (3, "no answer")
    assert breaker.retry_in_s == 30.0
    clock.now += 29.999
    assert breaker.admit() is None
    assert breaker.state is OPEN
    assert breaker.retry_in_s == pytest.approx(0.001)


def test_a_success_starts_the_count_of_failures_anew() -> None:
    breaker = CircuitBreaker("tamiyo", clock=Clock())
    for _ in range(5):
        fail(breaker, 2)
        breaker.settle(permit_of(breaker), True)
    assert (breaker.state, breaker.failures_in_a_row) == (CLOSED, 0)


def test_after_the_cooldown_one_probe_passes_at_a_time() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 30
    assert (breaker.state, breaker.retry_in_s) == (HALF_OPEN, 0.0)
    probe = permit_of(breaker)
    assert probe.probe
    assert breaker.admit() is None
    breaker.release(probe)
    assert (breaker.state, breaker.failures_in_a_row, breaker.opened_total) == (HALF_OPEN, 3, 1)
    again = permit_of(breaker)
    assert breaker.admit() is None
    breaker.settle(again, True)
    assert (breaker.state, breaker.failures_in_a_row) == (CLOSED, 0)
    assert not permit_of(breaker).probe


def test_each_failed_probe_doubles_the_cooldown_up_to_the_maximum_and_success_resets_it() -> None:
    clock = Clock()
    breaker = opened(clock, cooldown_s=10.0, max_cooldown_s=35.0)
    waits = []
    for _ in range(4):
        waits.append(breaker.retry_in_s)
        clock.now += waits[-1]
        fail(breaker)
    assert waits == [10.0, 20.0, 35.0, 35.0]
    assert (breaker.failures_in_a_row, breaker.opened_total) == (7, 5)
    clock.now += 35
    breaker.settle(permit_of(breaker), True)
    fail(breaker, 3)
    assert breaker.retry_in_s == 10.0


def test_the_cooldown_begins_when_the_probe_fails_not_when_it_was_let_through() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 30
    probe = permit_of(breaker)
    clock.now += 500
    breaker.settle(probe, False)
    assert breaker.retry_in_s == 60.0


def test_a_call_from_before_it_opened_changes_nothing() -> None:
    clock = Clock()
    breaker = CircuitBreaker("tamiyo", clock=clock)
    slow, slower = permit_of(breaker), permit_of(breaker)
    fail(breaker, 3, "broken")
    breaker.settle(slow, True)
    assert (breaker.state, breaker.failures_in_a_row) == (OPEN, 3)
    clock.now += 30
    probe = permit_of(breaker)
    breaker.settle(slower, False, "late")
    assert (breaker.state, breaker.last_error) == (HALF_OPEN, "broken")
    assert breaker.admit() is None, "the probe is still out"
    breaker.settle(probe, True)
    assert breaker.state is CLOSED


def test_a_call_from_before_it_closed_changes_nothing() -> None:
    clock = Clock()
    breaker = CircuitBreaker("tamiyo", failures=1, clock=clock)
    slow = permit_of(breaker)
    fail(breaker)
    clock.now += 30
    breaker.settle(permit_of(breaker), True)
    breaker.settle(slow, False, "late")
    assert (breaker.state, breaker.failures_in_a_row, breaker.last_error) == (CLOSED, 0, "")


@pytest.mark.parametrize("first", ["settle", "release"])
def test_a_permit_counts_once(first: str) -> None:
    breaker = CircuitBreaker("tamiyo", failures=2, clock=Clock())
    permit = permit_of(breaker)
    breaker.release(permit) if first == "release" else breaker.settle(permit, False)
    before = breaker.failures_in_a_row
    breaker.settle(permit, False, "again")
    breaker.release(permit)
    assert (breaker.failures_in_a_row, breaker.state, breaker.last_error) == (before, CLOSED, "")


def test_a_permit_spent_twice_does_not_free_the_probe_that_followed_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 30
    first = permit_of(breaker)
    breaker.release(first)
    permit_of(breaker)
    breaker.release(first)
    breaker.settle(first, True)
    assert breaker.admit() is None
    assert breaker.state is HALF_OPEN


def test_a_permit_of_another_breaker_is_refused() -> None:
    mine, other = (CircuitBreaker(name, clock=Clock()) for name in ("tamiyo", "kasmina"))
    for spend in (mine.release, lambda permit: mine.settle(permit, False)):
        with pytest.raises(ValueError, match=r"'tamiyo'.*given out by breaker 'kasmina'"):
            spend(permit_of(other))
    assert mine.failures_in_a_row == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"failures": 0}, "'tamiyo': failures is 0; give at least 1"),
        ({"cooldown_s": 0.0}, "cooldown_s is 0.0; give seconds above 0"),
        ({"cooldown_s": math.nan}, "cooldown_s is nan"),
        ({"cooldown_s": math.inf}, "cooldown_s is inf"),
        ({"max_cooldown_s": 5.0}, "max_cooldown_s is 5.0; give at least cooldown_s, which is 30"),
        ({"max_cooldown_s": math.inf}, "max_cooldown_s is inf"),
    ],
)
def test_parameters_out_of_range_are_refused_with_the_remedy(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CircuitBreaker("tamiyo", **parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"failures": 0}, "greater than 0"),
        ({"cooldown_s": math.inf}, "finite"),
        ({"cooldown_s": 600}, "give at least breaker.cooldown_s, which is 600"),
        ({"cooldown_s": 600, "max_cooldown_s": 500}, "give at least breaker.cooldown_s"),
        ({"cooldown_s": -1}, "greater than 0"),
    ],
)
def test_its_section_refuses_what_it_would_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BreakerConfig(**settings)


def test_its_section_is_its_parameters() -> None:
    assert BreakerConfig().model_dump() == {
        "failures": 3,
        "cooldown_s": 30.0,
        "max_cooldown_s": 300.0,
    }
    CircuitBreaker("tamiyo", **BreakerConfig().model_dump())


def test_each_transition_is_told_once_and_outside_the_lock() -> None:
    clock, changes, seen = Clock(), list[Change](), list[BreakerState]()

    def note(breaker: CircuitBreaker, before: BreakerState, after: BreakerState) -> None:
        changes.append((before, after))
        seen.append(breaker.state)

    breaker = opened(clock, on_change=note)
    clock.now += 30
    assert breaker.state is HALF_OPEN
    breaker.release(permit_of(breaker))
    fail(breaker)
    clock.now += 60
    breaker.settle(permit_of(breaker), True)
    breaker.settle(permit_of(breaker), True)
    assert changes == [
        (CLOSED, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, CLOSED),
    ]
    assert seen == [after for _, after in changes]


def test_a_listener_that_raises_does_not_keep_the_probe() -> None:
    def refuse(breaker: CircuitBreaker, before: BreakerState, after: BreakerState) -> None:
        if after is HALF_OPEN:
            raise RuntimeError("deaf")

    clock = Clock()
    breaker = opened(clock, on_change=refuse)
    clock.now += 30
    with pytest.raises(RuntimeError, match="deaf"):
        breaker.admit()
    assert breaker.state is HALF_OPEN
    breaker.settle(permit_of(breaker), True)
    assert breaker.state is CLOSED


def yielding_clock() -> float:
    """Let another thread run in the middle of whatever asks for the time."""
    time.sleep(0)
    return time.monotonic()


class Hammer:
    """Many threads call through one breaker; what they call fails two times in three."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.probes_out = self.most_probes_out = self.admitted = self.refused = 0
        self.changes: list[Change] = []
        self.breaker = CircuitBreaker(
            "tamiyo",
            failures=2,
            cooldown_s=1e-4,
            max_cooldown_s=4e-4,
            clock=yielding_clock,
            on_change=self.note,
        )

    def note(self, breaker: CircuitBreaker, before: BreakerState, after: BreakerState) -> None:
        with self.lock:
            self.changes.append((before, after))

    def call_often(self, worker: int) -> None:
        for number in range(3000):
            permit = self.breaker.admit()
            with self.lock:
                self.admitted += permit is not None
                self.refused += permit is None
                self.probes_out += permit is not None and permit.probe
                self.most_probes_out = max(self.most_probes_out, self.probes_out)
            if permit is None:
                continue
            time.sleep(0)
            with self.lock:
                self.probes_out -= permit.probe
            kind = (number + worker) % 7
            if kind == 0:
                self.breaker.release(permit)
            else:
                self.breaker.settle(permit, kind in (1, 2))


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
def test_threads_that_hammer_it_never_get_two_probes_and_every_transition_is_told_once() -> None:
    hammer = Hammer()
    threads = [threading.Thread(target=hammer.call_often, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hammer.admitted + hammer.refused == 8 * 3000
    assert hammer.most_probes_out == 1
    counts = Counter(hammer.changes)
    assert set(counts) <= {
        (CLOSED, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, OPEN),
        (HALF_OPEN, CLOSED),
    }
    assert counts[CLOSED, OPEN] + counts[HALF_OPEN, OPEN] == hammer.breaker.opened_total > 10
    # Whatever their order, the transitions form one walk from closed to where it is now.
    for state in BreakerState:
        entered = sum(n for (_, after), n in counts.items() if after is state)
        left = sum(n for (before, _), n in counts.items() if before is state)
        ends_here = hammer.breaker._state is state
        assert entered + (state is CLOSED) == left + ends_here


def test_one_thread_is_told_of_transitions_in_their_order() -> None:
    clock, changes = Clock(), list[Change]()
    breaker = opened(clock, on_change=lambda _, before, after: changes.append((before, after)))
    for number in range(40):
        clock.now += breaker.retry_in_s
        breaker.settle(permit_of(breaker), number % 3 == 0)
        fail(breaker, 3) if number % 3 == 0 else None
    assert all(first[1] is second[0] for first, second in pairwise(changes))
