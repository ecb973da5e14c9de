"""Conservative mode against a model that looks at the whole history each time."""

import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.core.config import ConservativeConfig
from esper.leyline import Level, ScaleLearningRate, SeedCommand, SeedOperation
from esper.tolaria.conservative import ConservativeMode

HEALTHY_STEPS = 3
FACTOR = 0.5
REASONS = ("rollback", "breaker of tamiyo opened", "emergency")


class Conservative(RuleBasedStateMachine):
    """Trouble comes, steps go well or not, conditions hold or not, a checkpoint is resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.holds = [False, False]
        # Since the mode was last entered: reasons as text, steps as booleans, in their order.
        self.story: list[str | bool | None] = []
        self.entered = self.left = 0
        self.told = 0
        self.mode = self.make()

    def make(self) -> ConservativeMode:
        mode = ConservativeMode(
            ConservativeConfig(healthy_steps=HEALTHY_STEPS, guard_factor=FACTOR), self.announce
        )
        mode.keep_while(lambda: "the first holds" if self.holds[0] else "")
        mode.keep_while(lambda: "the second holds" if self.holds[1] else "")
        return mode

    def announce(self, name: str, message: str, level: Level, data: dict[str, Any]) -> None:
        assert message
        assert level in (Level.INFO, Level.WARNING)
        self.events.append((name, data))

    def reasons(self) -> list[str]:
        return list(dict.fromkeys(part for part in self.story if isinstance(part, str)))

    @rule(reason=st.sampled_from(REASONS), step=st.integers(0, 1000))
    def enter(self, reason: str, step: int) -> None:
        new = reason not in self.reasons()
        self.entered += not self.story
        self.story.append(reason)
        before = len(self.events)
        self.mode.enter(reason, step)
        assert len(self.events) - before == new
        self.told += new
        if new:
            name, data = self.events[-1]
            assert name == "conservative_mode_entered"
            assert data == {"reason": reason, "reasons": self.reasons(), "step": step}

    @rule(healthy=st.sampled_from([True, True, True, False, None]), step=st.integers(0, 1000))
    def step(self, healthy: bool | None, step: int) -> None:
        before = len(self.events)
        self.mode.note_step(healthy, step)
        if not self.story:
            assert len(self.events) == before
            return
        self.story.append(healthy)
        stretch = [part for part in self.story if part is not None][-HEALTHY_STEPS:]
        if healthy is None:
            stretch = []
        leaves = stretch == [True] * HEALTHY_STEPS and not any(self.holds)
        assert len(self.events) - before == leaves
        if leaves:
            name, data = self.events[-1]
            assert name == "conservative_mode_left"
            assert data["reasons"] == self.reasons()
            assert data["steps"] == sum(not isinstance(part, str) for part in self.story)
            self.left += 1
            self.story = []

    @rule(which=st.integers(0, 1), holds=st.booleans())
    def change_condition(self, which: int, holds: bool) -> None:
        before = len(self.events), self.mode.active
        self.holds[which] = holds
        assert (len(self.events), self.mode.active) == before

    @rule()
    def resume(self) -> None:
        saved, before = json.loads(json.dumps(self.mode.state_dict())), len(self.events)
        self.mode = self.make()
        self.mode.load_state_dict(saved)
        assert self.mode.state_dict() == saved
        assert len(self.events) == before

    @invariant()
    def it_is_on_exactly_while_the_model_is(self) -> None:
        active = bool(self.story)
        assert self.mode.active == active
        assert self.mode.guard_factor == (FACTOR if active else 1.0)
        assert self.mode.metrics() == {
            "tolaria.mode.conservative": float(active),
            "tolaria.mode.conservative_entered_total": float(self.entered),
        }

    @invariant()
    def growth_is_refused_exactly_while_it_is_on(self) -> None:
        active = self.mode.active
        for operation in SeedOperation:
            risky = operation not in (SeedOperation.CULL, SeedOperation.HOLD)
            assert bool(self.mode.allows(SeedCommand("a", operation))) == (active and risky)
        assert bool(self.mode.allows(ScaleLearningRate(1.5))) == active
        assert not self.mode.allows(ScaleLearningRate(0.5))

    @invariant()
    def every_entry_is_left_at_most_once(self) -> None:
        assert self.entered - self.left == self.mode.active
        assert len(self.events) == self.told + self.left


Conservative.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
test_the_mode_does_what_the_model_does = Conservative.TestCase
