"""The circuit breaker against a model that derives everything from the log of what was counted."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.core.breaker import BreakerState, CircuitBreaker, Permit

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
LIMIT, BASE, MOST = 3, 8.0, 50.0


@dataclass(frozen=True)
class Outcome:
    """One call that counted, and whether it was a probe."""

    at: float
    ok: bool
    probe: bool


def split(log: list[Outcome]) -> list[list[Outcome]]:
    """Cut the log after each outcome that opened or closed the breaker."""
    eras: list[list[Outcome]] = [[]]
    for outcome in log:
        eras[-1].append(outcome)
        last = eras[-1][-LIMIT:]
        if outcome.probe or (len(last) == LIMIT and not any(entry.ok for entry in last)):
            eras.append([])
    return eras


def opening(log: list[Outcome]) -> Outcome | None:
    """Return the failure that keeps the breaker from being closed, if it is not."""
    ended = split(log)[:-1]
    if not ended or ended[-1][-1].ok:
        return None
    return ended[-1][-1]


def cooldown(log: list[Outcome]) -> float:
    """Return the cooldown that the last opening began."""
    doublings = 0
    for era in reversed(split(log)[:-1]):
        if not (era[-1].probe and not era[-1].ok):
            break
        doublings += 1
    return min(MOST, BASE * 2**doublings)


class Breaker(RuleBasedStateMachine):
    """Calls begin and end in any order while the clock moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.changes: list[tuple[BreakerState, BreakerState]] = []
        self.log: list[Outcome] = []
        self.out: list[tuple[Permit, int]] = []
        self.spent: list[Permit] = []
        self.probed = False
        self.breaker = CircuitBreaker(
            "tamiyo",
            failures=LIMIT,
            cooldown_s=BASE,
            max_cooldown_s=MOST,
            clock=lambda: self.now,
            on_change=lambda _, before, after: self.changes.append((before, after)),
        )

    def expected_state(self) -> BreakerState:
        since = opening(self.log)
        if since is None:
            return CLOSED
        return HALF_OPEN if self.now >= since.at + cooldown(self.log) else OPEN

    def fresh(self, era: int) -> bool:
        return era == len(split(self.log))

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 7.5, 8.0, 16.0, 50.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def wait_until_just_before_a_probe(self) -> None:
        since = opening(self.log)
        if since is not None:
            self.now = max(self.now, since.at + cooldown(self.log) - 0.25)

    @rule()
    def begin(self) -> None:
        state = self.expected_state()
        probe_out = any(permit.probe and self.fresh(era) for permit, era in self.out)
        permit = self.breaker.admit()
        assert (permit is not None) == (state is CLOSED or (state is HALF_OPEN and not probe_out))
        if permit is not None:
            assert permit.probe == (state is HALF_OPEN)
            self.out.append((permit, len(split(self.log))))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data: st.DataObject, ok: bool) -> None:
        permit, era = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.settle(permit, era, ok)

    @precondition(lambda self: self.out)
    @rule(ok=st.booleans())
    def end_the_newest(self, ok: bool) -> None:
        self.settle(*self.out.pop(), ok)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        permit, _ = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.breaker.release(permit)
        self.spent.append(permit)

    @precondition(lambda self: self.spent)
    @rule(data=st.data(), ok=st.booleans(), settle=st.booleans())
    def end_once_more(self, data: st.DataObject, ok: bool, settle: bool) -> None:
        permit = data.draw(st.sampled_from(self.spent))
        if settle:
            self.breaker.settle(permit, ok, "twice")
        else:
            self.breaker.release(permit)

    def settle(self, permit: Permit, era: int, ok: bool) -> None:
        counts = self.fresh(era)
        self.breaker.settle(permit, ok, f"failed at {self.now}")
        self.spent.append(permit)
        if not counts:
            return
        self.log.append(Outcome(self.now, ok, permit.probe))
        if ok:
            assert self.breaker.state is CLOSED
            assert self.breaker.failures_in_a_row == 0
        elif permit.probe:
            assert self.breaker.state is OPEN
            assert self.breaker.retry_in_s >= BASE

    @invariant()
    def it_is_where_the_model_is(self) -> None:
        breaker, state = self.breaker, self.expected_state()
        assert breaker.state is state
        since = opening(self.log)
        waiting = since is not None and state is OPEN
        expected = since.at + cooldown(self.log) - self.now if since and waiting else 0.0
        assert breaker.retry_in_s == expected
        failed = [entry for entry in self.log if not entry.ok]
        assert breaker.last_error == (f"failed at {failed[-1].at}" if failed else "")

    @invariant()
    def it_counts_as_the_model_does(self) -> None:
        in_a_row = 0
        for outcome in reversed(self.log):
            if outcome.ok:
                break
            in_a_row += 1
        assert self.breaker.failures_in_a_row == in_a_row
        assert self.breaker.opened_total == sum(not era[-1].ok for era in split(self.log)[:-1])

    @invariant()
    def no_more_than_one_probe_is_out(self) -> None:
        assert sum(permit.probe and self.fresh(era) for permit, era in self.out) <= 1

    @invariant()
    def each_transition_is_told_once_and_in_order(self) -> None:
        state = CLOSED
        for before, after in self.changes:
            assert before is state
            assert after is not state
            state = after
        ends = [CLOSED if era[-1].ok else OPEN for era in split(self.log)[:-1]]
        assert [after for _, after in self.changes if after is not HALF_OPEN] == ends


Breaker.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
test_the_breaker_does_what_the_model_does = Breaker.TestCase
