from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.leyline import EmergencyLevel
from support.emergencies import Stage

LEVELS = st.sampled_from([level for level in EmergencyLevel if level])
REASONS = st.sampled_from(["a", "b", "c"])
PER_MINUTE = 3


class Ladder(RuleBasedStateMachine):
    """The controller beside a model of what it promises."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(per_minute=PER_MINUTE)
        self.level = EmergencyLevel.NONE
        self.owed: set[tuple[EmergencyLevel, str]] = set()
        self.passed = self.suppressed = 0
        self.repeats_since_refill = 0
        self.unheard = self.changed = False

    @rule(level=LEVELS, reason=REASONS)
    def escalate(self, level: EmergencyLevel, reason: str) -> None:
        done = self.stage.controller.escalate(level, reason)
        if level > self.level:
            assert not done.suppressed, "a rising level always passes"
            self.level, self.unheard, self.changed = level, True, True
        elif done.suppressed:
            assert self.repeats_since_refill >= PER_MINUTE, "only too many repeats are suppressed"
            self.suppressed += 1
            return
        else:
            self.repeats_since_refill += 1
            assert self.repeats_since_refill <= PER_MINUTE
        self.passed += 1
        self.owed.add((level, reason))

    @rule(level=st.sampled_from(list(EmergencyLevel)))
    def downgrade(self, level: EmergencyLevel) -> None:
        try:
            self.stage.controller.downgrade(level)
        except ValueError:
            assert level >= self.level
        else:
            assert level < self.level
            self.level, self.unheard, self.changed = level, True, bool(level)

    @rule()
    def reset(self) -> None:
        if self.level:
            self.level, self.unheard, self.changed = EmergencyLevel.NONE, True, False
        self.stage.controller.reset()

    @rule(healthy=st.booleans())
    def end_epoch(self, healthy: bool) -> None:
        self.stage.controller.close_epoch(healthy)
        whole, self.changed = not self.changed, False
        if healthy and whole:
            self.unheard = self.unheard or bool(self.level)
            self.level = EmergencyLevel.NONE

    @rule(level=st.sampled_from(list(EmergencyLevel)), reason=REASONS)
    def another_process_sets(self, level: EmergencyLevel, reason: str) -> None:
        # The word of this stage is memory of one process; writing to it beside the controller is
        # what another process does to the file.
        self.stage.word.set(level, reason, "cli")
        order = self.stage.controller.take_order()
        assert order is not None
        assert (order.level, order.origin) == (level, "cli")
        if level and level >= self.level:
            self.owed.add((level, reason))
            self.passed += 1
        self.level, self.unheard, self.changed = level, False, bool(level)

    @rule()
    def look(self) -> None:
        order = self.stage.controller.take_order()
        assert (order is not None) == self.unheard, "the newest change is heard once"
        if order is not None:
            assert order.level is self.level
        self.unheard = False

    @rule(ok=st.booleans())
    def end_a_broadcast(self, ok: bool) -> None:
        self.stage.caller.end(ok)
        self.stage.controller.pump()

    @rule(refuses=st.booleans())
    def line(self, refuses: bool) -> None:
        self.stage.caller.refuses = refuses

    @rule()
    def a_minute_passes(self) -> None:
        self.stage.now += 60
        self.repeats_since_refill = 0
        self.stage.controller.pump()

    @invariant()
    def level_and_counters_are_as_promised(self) -> None:
        controller = self.stage.controller
        assert controller.level is self.level
        assert (controller.since is None) == (self.level is EmergencyLevel.NONE)
        metrics = controller.metrics()
        assert metrics["tolaria.emergency.escalations_total"] == self.passed
        assert metrics["tolaria.emergency.suppressed_total"] == self.suppressed

    def teardown(self) -> None:
        self.stage.caller.refuses = False
        for _ in range(200):
            self.stage.now += 60
            self.stage.controller.pump()
            self.stage.caller.end()
        told = {(signal.level, signal.reason) for signal in self.stage.published}
        assert told == self.owed, "nothing is lost, whatever failed"


TestLadder = Ladder.TestCase
TestLadder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
