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


def test_what_another_process_has_said_is_not_lost_when_the_run_escalates_too(
    tmp_path: Path,
) -> None:
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    with EmergencyWord(tmp_path / "word") as theirs:
        sequence = theirs.set(CRITICAL, "fire", "cli")
        stage.controller.escalate(MINOR, "restless")
        order = stage.controller.take_order()
        assert order is not None
        assert (order.level, order.reason, order.sequence) == (CRITICAL, "fire", sequence)
        assert stage.controller.level is level_in(theirs) is CRITICAL
        assert stage.names == ["emergency_escalated"] * 2


def test_what_another_process_has_said_is_passed_on_even_if_the_run_resets_at_that_moment(
    tmp_path: Path,
) -> None:
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    stage.controller.escalate(MINOR, "restless")
    with EmergencyWord(tmp_path / "word") as theirs:
        theirs.set(CRITICAL, "fire", "cli")
        stage.controller.reset("over")
    assert stage.controller.level is NONE
    assert stage.names == ["emergency_escalated", "emergency_escalated", "emergency_cleared"]
    assert stage.broadcasts.pending == 2


def test_what_another_process_has_said_is_not_ended_by_an_epoch_that_was_healthy_before(
    tmp_path: Path,
) -> None:
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    stage.controller.escalate(MINOR, "restless")
    stage.controller.take_order()
    stage.controller.close_epoch(healthy=True)
    with EmergencyWord(tmp_path / "word") as theirs:
        theirs.set(CRITICAL, "fire", "cli")
        stage.controller.close_epoch(healthy=True)
        assert level_in(theirs) is CRITICAL
    order = stage.controller.take_order()
    assert order is not None
    assert order.level is CRITICAL


def test_a_word_that_was_left_torn_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as earlier:
        sequence = earlier.set(CRITICAL, "long ago", "cli")
    with path.open("r+b") as file:
        file.write((sequence + 1).to_bytes(8, "little"))
    stage = Stage(word=EmergencyWord(path))
    assert level_in(stage.word) is NONE
    assert stage.controller.take_order() is None


def test_the_state_can_be_taken_while_another_thread_escalates() -> None:
    stage = Stage(per_minute=10**6)
    stage.caller.refuses = True
    ended = threading.Event()

    def escalate() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            stage.controller.escalate(MINOR, f"{number}")

    for number in range(1000):
        stage.controller.escalate(MINOR, f"earlier {number}")
    thread = threading.Thread(target=escalate)
    thread.start()
    try:
        for _ in range(400):
            stage.controller.state_dict()
    finally:
        ended.set()
        thread.join()


def test_after_the_end_an_escalation_still_fails_nobody(tmp_path: Path) -> None:
    stage = Stage(word=EmergencyWord(tmp_path / "word"))
    stage.controller.close()
    assert "ValueError" in stage.controller.escalate(MINOR, "too late").error
    stage.controller.reset()
    assert stage.controller.level is NONE
