import json
from typing import Any

import pytest

from esper.core.config import ConservativeConfig
from esper.leyline import (
    AdaptationCommand,
    Event,
    Level,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
)
from esper.tolaria.conservative import ConservativeMode

HEALTHY_STEPS = 5


class Place:
    """A conservative mode, and the events it announced."""

    def __init__(self, **config: Any) -> None:
        self.events: list[Event] = []
        settings = {"healthy_steps": HEALTHY_STEPS} | config
        self.mode = ConservativeMode(ConservativeConfig(**settings), self.announce)

    def announce(self, name: str, message: str, level: Level, data: dict[str, Any]) -> None:
        json.dumps(data)
        self.events.append(Event(name=name, time=0.0, message=message, level=level, data=data))

    def steps(self, *healthy: bool, first: int = 0) -> None:
        for number, is_healthy in enumerate(healthy):
            self.mode.note_step(is_healthy, first + number)


def test_at_first_everything_is_allowed_and_nothing_is_told() -> None:
    place = Place()
    place.steps(True, False, True)
    assert not place.mode.active
    assert place.mode.guard_factor == 1.0
    assert place.mode.allows(SeedCommand("a", SeedOperation.GERMINATE)) == ""
    assert place.mode.allows(ScaleLearningRate(2.0)) == ""
    assert place.events == []


def test_entering_announces_the_reason() -> None:
    place = Place()
    place.mode.enter("rollback at step 41", 41)
    assert place.mode.active
    (event,) = place.events
    assert (event.name, event.level) == ("conservative_mode_entered", Level.WARNING)
    assert "rollback at step 41" in event.message
    assert "until 5 steps are healthy" in event.message
    assert event.data == {
        "reason": "rollback at step 41",
        "reasons": ["rollback at step 41"],
        "step": 41,
    }


def test_it_is_left_after_a_healthy_stretch_with_its_length_and_reasons() -> None:
    place = Place()
    place.mode.enter("rollback", 10)
    place.steps(True, True, False, *[True] * 4, first=10)
    assert place.mode.active
    place.steps(True, first=17)
    assert not place.mode.active
    event = place.events[-1]
    assert (event.name, event.level) == ("conservative_mode_left", Level.INFO)
    assert event.message == (
        "conservative mode left after 8 steps; it had been entered because of: rollback"
    )
    assert event.data == {"steps": 8, "reasons": ["rollback"], "since_step": 10, "step": 17}


def test_a_new_reason_is_announced_and_an_old_one_only_restarts_the_stretch() -> None:
    place = Place()
    place.mode.enter("rollback", 0)
    place.steps(*[True] * 4)
    place.mode.enter("rollback", 4)
    assert len(place.events) == 1
    place.steps(*[True] * 4)
    place.mode.enter("breaker of tamiyo opened", 8)
    assert place.events[-1].data["reasons"] == ["rollback", "breaker of tamiyo opened"]
    place.steps(*[True] * 4)
    assert place.mode.active
    place.steps(True)
    assert not place.mode.active
    assert place.events[-1].data["reasons"] == ["rollback", "breaker of tamiyo opened"]
    assert place.events[-1].data["steps"] == 13
    assert len(place.events) == 3


def test_steps_that_jump_back_after_a_rollback_count_as_steps() -> None:
    place = Place()
    place.mode.enter("rollback", 90)
    for step in (91, 92, 80, 81, 82):
        assert place.mode.active
        place.mode.note_step(True, step)
    assert not place.mode.active
    assert place.events[-1].data["steps"] == 5


def test_it_is_not_left_while_a_condition_holds() -> None:
    place, held, asked = Place(), ["breaker of tamiyo is open"], []

    def condition() -> str:
        asked.append(place.mode.active)
        return held[0]

    place.mode.keep_while(lambda: "")
    place.mode.keep_while(condition)
    place.steps(*[True] * 9)
    assert not place.mode.active, "a condition does not enter the mode"
    place.mode.enter("rollback", 9)
    place.steps(*[True] * 12)
    assert place.mode.active
    held[0] = ""
    place.steps(True)
    assert not place.mode.active
    assert asked == [True] * 9, "it is asked only when the mode could be left"


def test_it_may_be_entered_again_with_reasons_of_its_own() -> None:
    place = Place()
    for reason in ("rollback", "emergency"):
        place.mode.enter(reason, 0)
        place.steps(*[True] * HEALTHY_STEPS)
    names = [event.name for event in place.events]
    assert names == ["conservative_mode_entered", "conservative_mode_left"] * 2
    assert [event.data["reasons"] for event in place.events[1::2]] == [["rollback"], ["emergency"]]
    assert place.events[-1].data["steps"] == HEALTHY_STEPS
    assert place.mode.metrics() == {
        "tolaria.mode.conservative": 0.0,
        "tolaria.mode.conservative_entered_total": 2.0,
    }


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (SeedCommand("a", SeedOperation.GERMINATE, "conv"), "no growth .*germinate seed 'a'"),
        (SeedCommand("a", SeedOperation.ADVANCE), "no growth .*advance seed 'a'"),
        (SeedCommand("a", SeedOperation.CULL), ""),
        (ScaleLearningRate(1.01), "no higher learning rate .*factor 1.01"),
        (ScaleLearningRate(float("nan")), "no higher learning rate .*factor nan"),
        (ScaleLearningRate(1.0), ""),
        (ScaleLearningRate(0.5), ""),
    ],
)
def test_growth_and_a_higher_rate_are_refused_meanwhile(
    command: AdaptationCommand, refusal: str
) -> None:
    place = Place()
    place.mode.enter("rollback", 0)
    if refusal:
        with pytest.raises(AssertionError, match=refusal):
            raise AssertionError(place.mode.allows(command))
        assert "in conservative mode (rollback)" in place.mode.allows(command)
    else:
        assert place.mode.allows(command) == ""
    place.steps(*[True] * HEALTHY_STEPS)
    assert place.mode.allows(command) == ""


def test_the_guard_is_stricter_meanwhile() -> None:
    place = Place(guard_factor=0.9)
    place.mode.enter("rollback", 0)
    assert place.mode.guard_factor == 0.9
    assert place.mode.metrics()["tolaria.mode.conservative"] == 1.0
    place.steps(*[True] * HEALTHY_STEPS)
    assert place.mode.guard_factor == 1.0


def test_a_saved_mode_goes_on_as_the_original_without_a_word() -> None:
    place, other = Place(), Place()
    place.mode.enter("rollback", 3)
    place.mode.enter("emergency", 4)
    place.steps(False, True, True)
    other.mode.load_state_dict(json.loads(json.dumps(place.mode.state_dict())))
    assert other.events == []
    assert other.mode.active
    for each in (place, other):
        each.steps(True, True, True, first=8)
    assert not other.mode.active
    assert other.events[-1] == place.events[-1]
    assert other.mode.state_dict() == place.mode.state_dict()
    assert other.mode.metrics() == place.mode.metrics()


def test_a_saved_state_is_a_copy() -> None:
    place = Place()
    place.mode.enter("rollback", 0)
    saved = place.mode.state_dict()
    place.mode.enter("emergency", 1)
    assert saved["reasons"] == ["rollback"]
    place.mode.load_state_dict(saved)
    place.mode.enter("breaker", 2)
    assert saved["reasons"] == ["rollback"]


@pytest.mark.parametrize(
    "settings", [{"healthy_steps": 0}, {"guard_factor": 0}, {"guard_factor": 1.1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConservativeConfig(**settings)
