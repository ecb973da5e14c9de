from esper.leyline import EmergencyLevel, EmergencySignal, Level
from support.emergencies import Stage


def signal(number: int, reason: str = "") -> EmergencySignal:
    return EmergencySignal(
        f"id{number}", EmergencyLevel.MAJOR, reason or f"reason {number}", "engine", 0.0, "run", 0
    )


def test_a_signal_is_published_once_and_in_order() -> None:
    stage = Stage()
    for number in range(3):
        stage.broadcasts.send(signal(number))
    for _ in range(6):
        stage.broadcasts.pump()
        stage.caller.end()
    assert [sent.id for sent in stage.published] == ["id0", "id1", "id2"]
    stage.broadcasts.pump()
    assert (stage.broadcasts.sent, stage.broadcasts.pending) == (3, 0)
    assert stage.broadcasts.last_latency_ms == 1.0


def test_one_that_fails_is_critical_is_kept_and_is_tried_again_later_and_later() -> None:
    stage = Stage()
    stage.broadcasts.send(signal(0))
    tried: list[float] = []
    while stage.now < 100:
        stage.broadcasts.pump()
        if stage.caller.asked is not None:
            tried.append(stage.now)
            stage.caller.end(ok=False)
            stage.broadcasts.pump()
        stage.now += 0.5
    assert tried == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 61.0, 91.0]
    assert stage.events == [("emergency_broadcast_failed", Level.CRITICAL)] * len(tried)
    assert (stage.broadcasts.failed, stage.broadcasts.pending) == (len(tried), 1)
    stage.now = 200.0
    stage.broadcasts.pump()
    stage.caller.end()
    stage.broadcasts.pump()
    assert [sent.id for sent in stage.published] == ["id0"]


def test_one_that_cannot_be_sent_at_present_is_kept() -> None:
    stage = Stage()
    stage.caller.refuses = True
    stage.broadcasts.send(signal(0))
    stage.broadcasts.pump()
    stage.caller.refuses = False
    stage.now = 5.0
    stage.broadcasts.pump()
    stage.caller.end()
    assert len(stage.published) == 1


def test_what_waits_already_is_not_added_again() -> None:
    stage = Stage()
    for number in range(1000):
        stage.broadcasts.send(signal(number, reason="the same"))
    assert stage.broadcasts.pending == 1


def test_without_anybody_to_tell_nothing_is_kept() -> None:
    stage = Stage(listens=False)
    stage.broadcasts.send(signal(0))
    stage.broadcasts.pump()
    assert stage.broadcasts.pending == 0


def test_what_waits_outlives_the_process() -> None:
    first, second = Stage(), Stage()
    for number in range(2):
        first.broadcasts.send(signal(number))
    first.broadcasts.pump()
    second.broadcasts.send(signal(2))
    second.broadcasts.load_state_dict(first.broadcasts.state_dict())
    for _ in range(6):
        second.broadcasts.pump()
        second.caller.end()
    assert [sent.id for sent in second.published] == ["id0", "id1", "id2"]
    assert second.published[0] == signal(0)


def test_loading_while_a_call_is_under_way_drops_neither() -> None:
    stage, saved = Stage(), Stage()
    saved.broadcasts.send(signal(0))
    stage.broadcasts.send(signal(1))
    stage.broadcasts.pump()
    stage.broadcasts.load_state_dict(saved.broadcasts.state_dict())
    for _ in range(4):
        stage.caller.end()
        stage.broadcasts.pump()
    assert [sent.id for sent in stage.published] == ["id1", "id0"]
    assert stage.broadcasts.pending == 0
