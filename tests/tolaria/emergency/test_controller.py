import threading
from pathlib import Path

import pytest

from esper.leyline import EmergencyLevel, Level
from esper.tolaria.emergency import EmergencyController, EmergencyWord
from support.emergencies import Stage

NONE, MINOR, MAJOR = EmergencyLevel.NONE, EmergencyLevel.MINOR, EmergencyLevel.MAJOR
SEVERE, CRITICAL = EmergencyLevel.SEVERE, EmergencyLevel.CRITICAL


def level_in(word: EmergencyWord) -> EmergencyLevel:
    state = word.read()
    assert state is not None
    return state.level


def test_an_escalation_sets_the_word_and_is_published() -> None:
    stage = Stage()
    done = stage.controller.escalate("severe", "loss is gone")
    assert level_in(stage.word) is SEVERE
    assert done is stage.controller.last_escalation
    assert (done.level, done.reason, done.error, done.suppressed) == (
        SEVERE,
        "loss is gone",
        "",
        False,
    )
    assert done.latency_ms > 0
    assert (stage.controller.level, stage.controller.reason) == (SEVERE, "loss is gone")
    assert stage.controller.since is not None
    assert stage.events == [("emergency_escalated", Level.CRITICAL)]
    stage.caller.end()
    stage.controller.pump()
    (told,) = stage.published
    assert (told.level, told.reason, told.origin, told.run, told.step) == (
        SEVERE,
        "loss is gone",
        "engine",
        "run",
        7,
    )


@pytest.mark.parametrize(
    ("level", "reason"), [("none", "x"), ("bad", "x"), (9, "x"), ("minor", " ")]
)
def test_what_makes_no_sense_is_refused_before_anything_happens(
    level: str | int, reason: str
) -> None:
    stage = Stage()
    with pytest.raises(ValueError):
        stage.controller.escalate(level, reason)
    assert stage.controller.last_escalation is None
    assert stage.word.sequence == 0
    assert stage.events == []


def test_the_level_only_rises_and_repeats_are_limited() -> None:
    stage = Stage(per_minute=2)
    stage.controller.escalate(MAJOR, "first")
    assert not stage.controller.escalate(MINOR, "lower").suppressed
    assert not stage.controller.escalate(MAJOR, "same").suppressed
    assert stage.controller.escalate(MAJOR, "once too often").suppressed
    assert stage.controller.level is MAJOR
    assert stage.controller.reason == "first"
    assert not stage.controller.escalate(SEVERE, "worse").suppressed
    assert not stage.controller.escalate(CRITICAL, "worst").suppressed
    assert stage.controller.metrics()["tolaria.emergency.suppressed_total"] == 1
    assert stage.controller.metrics()["tolaria.emergency.escalations_total"] == 5


def test_a_word_that_cannot_be_set_is_told_and_stops_nothing() -> None:
    stage = Stage()
    stage.word.close()
    done = stage.controller.escalate(CRITICAL, "fire")
    assert "ValueError" in done.error
    assert stage.names == ["emergency_word_failed", "emergency_escalated"]
    assert stage.broadcasts.pending == 1
    assert stage.controller.level is CRITICAL


def test_a_reset_clears_level_reason_and_timestamp_and_keeps_the_history() -> None:
    stage = Stage()
    done = stage.controller.escalate(MINOR, "why")
    stage.controller.reset("over")
    controller = stage.controller
    assert (controller.level, controller.reason, controller.since) == (NONE, "", None)
    assert level_in(stage.word) is NONE
    assert controller.last_escalation is done
    assert stage.names == ["emergency_escalated", "emergency_cleared"]
    controller.reset()
    assert len(stage.events) == 2


def test_a_downgrade_lowers_and_nothing_else() -> None:
    stage = Stage()
    stage.controller.escalate(SEVERE, "why")
    stage.controller.downgrade("minor", "better")
    assert (stage.controller.level, stage.controller.reason) == (MINOR, "better")
    for level in (MINOR, CRITICAL):
        with pytest.raises(ValueError, match="not below"):
            stage.controller.downgrade(level)
    stage.controller.downgrade(NONE)
    assert stage.controller.level is NONE


def test_a_whole_healthy_epoch_ends_an_emergency_and_another_does_not() -> None:
    stage = Stage()
    stage.controller.escalate(MINOR, "why")
    stage.controller.close_epoch(healthy=True)
    assert stage.controller.level is MINOR, "it began in this epoch"
    stage.controller.close_epoch(healthy=False)
    assert stage.controller.level is MINOR
    stage.controller.close_epoch(healthy=True)
    assert stage.controller.level is NONE


def test_an_order_is_given_once_and_its_acting_is_acknowledged_in_the_word() -> None:
    stage = Stage()
    assert stage.controller.take_order() is None
    stage.controller.escalate(MAJOR, "why")
    order = stage.controller.take_order()
    assert order is not None
    assert (order.level, order.reason) == (MAJOR, "why")
    assert stage.controller.take_order() is None
    stage.controller.acted(order)
    assert stage.word.acknowledged is not None
    assert stage.word.acknowledged[0] == stage.word.sequence
    assert stage.names[-1] == "emergency_acted"
    assert stage.controller.metrics()["tolaria.emergency.last_act_latency_ms"] > 0


def test_acting_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.controller.escalate(CRITICAL, "why")
    order = stage.controller.take_order()
    assert order is not None
    # A step in between took this long.
    monkeypatch.setattr("time.monotonic_ns", lambda: order.issued_ns + 150_000_000)
    stage.controller.acted(order)
    assert stage.events[-1] == ("emergency_acted_late", Level.WARNING)
    assert stage.controller.metrics()["tolaria.emergency.late_acts_total"] == 1


def test_other_processes_are_heard_and_what_they_say_is_passed_on(tmp_path: Path) -> None:
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    with EmergencyWord(tmp_path / "word") as theirs:
        theirs.set(SEVERE, "from outside", "cli")
        order = stage.controller.take_order()
        assert order is not None
        assert (order.level, order.reason, order.origin) == (SEVERE, "from outside", "cli")
        assert stage.controller.level is SEVERE
        assert stage.names == ["emergency_escalated"]
        assert stage.broadcasts.pending == 1
        theirs.set(MINOR, "better", "cli")
        order = stage.controller.take_order()
        assert order is not None
        assert order.level is MINOR
        theirs.set(NONE, "", "cli")
        order = stage.controller.take_order()
        assert order is not None
        assert order.level is NONE
        assert stage.controller.since is None
        assert stage.names[1:] == ["emergency_downgraded", "emergency_cleared"]


def test_a_level_left_by_an_earlier_process_is_cleared(tmp_path: Path) -> None:
    with EmergencyWord(tmp_path / "word") as earlier:
        earlier.set(CRITICAL, "long ago", "cli")
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    assert stage.controller.level is NONE
    assert stage.controller.take_order() is None
    assert level_in(stage.word) is NONE
    assert stage.names == ["emergency_cleared"]


def test_broadcasts_and_counters_are_resumed() -> None:
    first, second = Stage(), Stage()
    first.controller.escalate(MINOR, "why")
    second.controller.load_state_dict(first.controller.state_dict())
    assert second.broadcasts.pending == 1
    assert second.controller.metrics()["tolaria.emergency.escalations_total"] == 1


def test_escalations_from_many_threads_all_count(tmp_path: Path) -> None:
    stage = Stage(per_minute=10_000)

    def escalate(controller: EmergencyController, number: int) -> None:
        for index in range(100):
            controller.escalate(1 + (index + number) % 4, f"{number}")

    threads = [threading.Thread(target=escalate, args=(stage.controller, n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.controller.metrics()["tolaria.emergency.escalations_total"] == 400
    assert level_in(stage.word) is stage.controller.level is CRITICAL
