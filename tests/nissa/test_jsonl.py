import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import (
    Event,
    Gain,
    GrowthState,
    Level,
    Record,
    RunError,
    SeedState,
    Stage,
    StepRecord,
    SystemState,
)
from esper.nissa import JsonlSink, read_records

number = st.floats(allow_nan=False)
names = st.text(min_size=1, max_size=8)
steps = st.builds(
    StepRecord,
    step=st.integers(0, 10**9),
    attempt=st.integers(0, 9),
    epoch=st.integers(0, 99),
    batch=st.integers(0, 99),
    time=st.floats(0, 1e10),
    action=st.sampled_from(["commit", "skip"]),
    loss=number,
    losses=st.dictionaries(names, number),
    learning_rate=number,
    gradient_norm=st.none() | number,
    cosines=st.dictionaries(names, number),
    reason=st.text(),
)
events = st.builds(
    Event,
    name=names,
    time=st.floats(0, 1e10),
    message=st.text(),
    level=st.sampled_from(Level),
    data=st.dictionaries(names, st.none() | st.integers() | st.booleans() | st.text()),
)


def write(path: Path, records: list[Record]) -> None:
    sink = JsonlSink(path)
    for record in records:
        sink.write(record)
    sink.close()


@given(records=st.lists(steps | events, max_size=5))
def test_records_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "events.jsonl"
    write(path, records)
    assert list(read_records(path)) == records


def test_a_loss_that_is_not_finite_survives(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    losses = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    write(
        path,
        [
            StepRecord(
                step=3, attempt=0, epoch=0, batch=3, time=1.0, action="skip", loss=math.nan,
                losses=losses, learning_rate=0.1, gradient_norm=math.inf, reason="NaN",
            ),
            SystemState(epoch=0, step=4, attempt=0, time=2.0, losses={"a": math.inf}),
        ],
    )  # fmt: skip
    step, state = read_records(path)
    assert isinstance(step, StepRecord)
    assert math.isnan(step.loss)
    assert math.isnan(step.losses.pop("a"))
    assert step.losses == {"b": math.inf, "c": -math.inf, "d": 1.5}
    assert step.gradient_norm == math.inf
    assert step.reason == "NaN", "text stays text"
    assert isinstance(state, SystemState)
    assert state.losses == {"a": math.inf}


def test_an_epoch_whose_growth_and_metrics_are_not_finite_survives(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seed = SeedState(Stage.TRAINING, residual=math.inf, gain=Gain(0.1, -math.inf, math.inf, 1))
    growth = GrowthState(3, {"NaN": seed}, 10, held_out={"a": math.inf})
    state = SystemState(
        epoch=0, step=4, attempt=0, time=2.0, losses={"a": 1.0}, metrics={"m": -math.inf},
        growth=growth, memory_mb=math.inf,
    )  # fmt: skip
    write(path, [state])
    assert list(read_records(path)) == [state]


def event(name: str) -> Event:
    return Event(name=name, time=0.0, message="")


def test_a_torn_last_line_is_left_out_and_cut_off_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [event("one")])
    with path.open("ab") as file:
        file.write(b'{"type":"event","na')
    assert [r.name for r in read_records(path) if isinstance(r, Event)] == ["one"]
    write(path, [event("two")])
    assert [r.name for r in read_records(path) if isinstance(r, Event)] == ["one", "two"]


def test_damage_elsewhere_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [event("one")])
    with path.open("ab") as file:
        file.write(b"garbage\n")
    write(path, [event("two")])
    with pytest.raises(RunError, match="line 2 is damaged"):
        list(read_records(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        list(read_records(tmp_path / "events.jsonl"))


def test_unknown_fields_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type":"event","name":"x","time":0,"message":"","later":1}\n')
    assert [r.name for r in read_records(path) if isinstance(r, Event)] == ["x"]
