import sys
import threading

from esper.leyline import Event, Record, StepRecord
from esper.nissa import NullHub, TelemetryHub


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number, attempt=0, epoch=0, batch=number, time=0.0, action="commit",
        loss=1.0, losses={"loss": 1.0}, learning_rate=0.1,
    )  # fmt: skip


def event(name: str) -> Event:
    return Event(name=name, time=0.0, message=name)


class Memory:
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False
        self.flushes = 0

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None:
        self.flushes += 1

    def close(self) -> None:
        self.closed = True


class Failing(Memory):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def write(self, record: Record) -> None:
        if self.times:
            self.times -= 1
            raise OSError("no space left")
        super().write(record)


class Hanging(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.entered = threading.Event()

    def write(self, record: Record) -> None:
        self.entered.set()
        self.release.wait()


def test_every_sink_gets_every_record_in_order() -> None:
    sinks = [Memory(), Memory()]
    with TelemetryHub(sinks) as hub:
        for number in range(500):
            hub.emit(step(number))
    for sink in sinks:
        assert [r.step for r in sink.records if isinstance(r, StepRecord)] == list(range(500))
        assert sink.closed
        assert sink.flushes


def test_flush_waits_until_all_is_written() -> None:
    sink = Memory()
    hub = TelemetryHub([sink])
    hub.emit(step(1))
    assert hub.flush()
    assert len(sink.records) == 1
    assert not sink.closed
    assert hub.close()


def test_a_sink_that_fails_once_is_counted_told_of_and_kept() -> None:
    failing, other = Failing(1), Memory()
    with TelemetryHub([failing, other]) as hub:
        for number in range(3):
            hub.emit(step(number))
    assert hub.failures == {"Failing": 1, "Memory": 0}
    assert [r.step for r in failing.records if isinstance(r, StepRecord)] == [1, 2]
    told = [r for r in other.records if isinstance(r, Event)]
    assert [e.name for e in told] == ["sink_failed"]
    assert "no space left" in told[0].message


def test_a_sink_that_keeps_failing_is_disabled_and_the_others_go_on() -> None:
    failing, other = Failing(10**6), Memory()
    with TelemetryHub([failing, other], max_failures=3) as hub:
        for number in range(20):
            hub.emit(step(number))
    assert hub.failures["Failing"] == 3
    assert len([r for r in other.records if isinstance(r, StepRecord)]) == 20
    assert [r.name for r in other.records if isinstance(r, Event)] == [
        "sink_failed",
        "sink_disabled",
    ]


def test_a_hanging_sink_holds_up_neither_emit_nor_close() -> None:
    hanging = Hanging()
    hub = TelemetryHub([hanging])
    hub.emit(step(0))
    assert hanging.entered.wait(5)
    for number in range(1000):
        hub.emit(step(number))
    assert not hub.flush(timeout_s=0.05)
    assert not hub.close(timeout_s=0.05)
    hanging.release.set()
    hub._thread.join(5)
    assert not hub._thread.is_alive()


def test_a_full_queue_drops_steps_and_never_events() -> None:
    hanging = Hanging()
    hub = TelemetryHub([hanging], capacity=10)
    hub.emit(event("first"))
    assert hanging.entered.wait(5)
    for number in range(50):
        hub.emit(step(number))
        if number % 10 == 0:
            hub.emit(event(f"at {number}"))
    waiting = list(hub._waiting)
    assert hub.dropped == 50 - len([r for r in waiting if isinstance(r, StepRecord)])
    assert hub.dropped > 35
    assert [r.name for r in waiting if isinstance(r, Event)] == [
        f"at {n}" for n in range(0, 50, 10)
    ]
    hanging.release.set()
    assert hub.close()


def test_emitting_is_one_python_call() -> None:
    hub = TelemetryHub([])
    record = step(0)
    calls = 0

    def count(frame: object, kind: str, argument: object) -> None:
        nonlocal calls
        calls += kind == "call"

    sys.setprofile(count)
    for _ in range(100):
        hub.emit(record)
    sys.setprofile(None)
    hub.close()
    assert calls == 100


def test_the_null_hub_takes_everything() -> None:
    hub = NullHub()
    hub.emit(step(0))
    assert hub.flush()
    assert hub.close()
