import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import Event, Level, Record, RunError, StepRecord, SystemState
from esper.nissa import JsonlSink
from esper.nissa.report import Story, render, write_report
from esper.nissa.report.series import Chart, Series, smooth, split_kept, thin
from nissa.report.browser import drawn

TASKS = ("left", "right")


def step(number: int, attempt: int = 0, loss: float = 1.0, *, pair: bool = True) -> StepRecord:
    cosine = math.sin(number)
    return StepRecord(
        step=number, attempt=attempt, epoch=number // 50, batch=number % 50, time=1e9 + number / 50,
        action="commit", loss=2 * loss, losses=dict.fromkeys(TASKS if pair else ("loss",), loss),
        learning_rate=0.1, gradient_norm=loss,
        conflicts=int(cosine < 0) if pair else None,
        conflict_rate=float(cosine < 0) if pair else None,
        cosines={"left|right": cosine} if pair else {},
        timings_ms={"forward": 1.0, "backward": 3.0},
    )  # fmt: skip


STARTED = Event(
    name="run_started", time=1e9, message="", data={
        "run": "r", "job": "digits", "parameters": 10, "samples": 20, "validation_samples": 5,
        "epochs": 4, "steps_per_epoch": 50, "device": "cpu", "seed": 3, "drill": True,
        "versions": {"esper": "0.1", "torch": "2.13"},
    },
)  # fmt: skip


def records(*, pair: bool = True) -> list[Record]:
    """A run of 200 steps that diverges at 120, goes back to 100, and ends."""
    result: list[Record] = [STARTED]
    result += [step(n, loss=math.exp(-n / 100), pair=pair) for n in range(119)]
    result += [step(119, loss=500.0, pair=pair), step(120, loss=math.nan, pair=pair)]
    result.append(
        Event(name="drill_injected", time=1e9, message="poison", step=119, data={"step": 119})
    )
    result.append(
        Event(
            name="rollback", time=1e9 + 3, message="went back", step=100, level=Level.WARNING,
            data={"from_step": 120, "to_step": 100, "latency_ms": 1.25},
        )
    )  # fmt: skip
    result += [step(n, 1, loss=math.exp(-n / 100), pair=pair) for n in range(100, 200)]
    result += [
        SystemState(
            epoch=epoch, step=50 * (epoch + 1), attempt=epoch // 2, time=1e9,
            losses={"left": 0.5, "right": 0.25}, validation={"left.accuracy": 0.9 + epoch / 100},
        )
        for epoch in range(4)
    ]  # fmt: skip
    result.append(
        Event(
            name="run_ended", time=1e9 + 10, message="", step=200,
            data={"outcome": "completed", "skipped": 0, "rollbacks": 1},
        )
    )  # fmt: skip
    return result


def chart(story: Story, key: str) -> Chart:
    return next(c for c in story.charts() if c.key == key)


def test_steps_taken_back_are_told_from_those_that_count() -> None:
    kept, lost = split_kept([r for r in records() if isinstance(r, StepRecord)])
    assert [r.step for r in kept] == list(range(200))
    assert [r.step for r in lost] == list(range(100, 121))
    assert {r.attempt for r in lost} == {0}


def test_a_run_that_ends_right_after_a_rollback_has_lost_what_lay_beyond() -> None:
    steps = [step(n) for n in range(30)] + [step(n, 1) for n in range(10, 15)]
    kept, lost = split_kept(steps)
    assert [r.step for r in kept] == list(range(15))
    assert [r.step for r in lost] == list(range(10, 30))


def test_the_story_is_told_in_one_sentence() -> None:
    story = Story.of(records())
    assert story.sentence() == (
        "4 epochs in 10 s; a divergence at step 120 was taken back to step 100 in 1.2 ms; "
        "it ended at left.accuracy 0.93."
    )
    assert story.outcome == "completed"
    assert Story.of(records()[:-1]).outcome == "interrupted"
    assert Story().sentence() == "0 epochs."


def test_the_rollback_and_the_drill_are_marked() -> None:
    marks = Story.of(records()).marks()
    assert marks[0] == {
        "kind": "rollback", "from": 120, "to": 100, "label": "rollback 120 → 100"
    }  # fmt: skip
    assert marks[1]["at"] == 119


def test_lost_steps_are_a_series_of_their_own_and_nan_is_a_gap() -> None:
    loss = chart(Story.of(records()), "loss")
    by_label = {series.label: series for series in loss.series if series.kind != "faint"}
    lost = dict(zip(loss.x, by_label["left, taken back"].values, strict=True))
    assert lost[119] == 500.0
    assert lost[120] is None
    assert lost[50] is None
    kept = dict(zip(loss.x, by_label["left"].values, strict=True))
    assert kept[119] is not None
    assert kept[119] < 1


def test_a_single_task_has_no_conflict_charts() -> None:
    keys = {c.key for c in Story.of(records(pair=False)).charts()}
    assert keys == {"loss", "validation", "gradient", "rate"}
    assert {"conflict", "cosine"} <= {c.key for c in Story.of(records()).charts()}


@given(
    columns=st.integers(1, 4),
    length=st.integers(0, 3000),
    most=st.integers(50, 400),
    seed=st.integers(0, 100),
)
def test_thinning_keeps_ends_and_extremes(columns: int, length: int, most: int, seed: int) -> None:
    values = [
        [
            None if (n * 7 + c + seed) % 11 == 0 else math.sin(n * (c + 1) + seed)
            for n in range(length)
        ]
        for c in range(columns)
    ]
    chosen = thin(values, length, most)
    assert chosen <= set(range(length))
    if length:
        assert {0, length - 1} <= chosen
    if length > most:
        assert len(chosen) <= most + 2
    for column in values:
        present = [value for value in column if value is not None]
        kept = [column[i] for i in chosen if column[i] is not None]
        if present:
            assert max(present) == max(kept)  # type: ignore[type-var]
            assert min(present) == min(kept)  # type: ignore[type-var]


def test_a_thinned_chart_keeps_everything_around_a_rollback() -> None:
    big = Chart("k", "t", list(range(100_000)), [Series("s", [0.0] * 100_000)])
    thinned = big.thinned([50_000])
    assert len(thinned.x) < 3200
    assert set(range(49_975, 50_026)) <= set(thinned.x)
    assert thinned.x == sorted(thinned.x)


def test_smoothing_starts_at_the_first_value_and_keeps_gaps() -> None:
    assert smooth([3.0, None, 3.0]) == [pytest.approx(3.0), None, pytest.approx(3.0)]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_one_file_and_hostile_names_are_text() -> None:
    name = "</script><b>bold</b>"
    hostile = Event(name="rollback", time=1e9, message=name, data={
        "from_step": 2, "to_step": 1, "latency_ms": 1.0, "note": name,
    })  # fmt: skip
    page = render(Story.of([*records(), hostile]), name, f"x = '{name}'")
    parser = Tags()
    parser.feed(page)
    tags = [tag for tag, _ in parser.found]
    assert "b" not in tags
    assert tags.count("script") == 2
    assert not [
        a for _, a in parser.found if "src" in a or str(a.get("href", "")).startswith("http")
    ]


def write_run(run: Path) -> None:
    sink = JsonlSink(run / "events.jsonl")
    for record in records():
        sink.write(record)
    sink.close()
    (run / "config.toml").write_text("[train]\nepochs = 4\n")


@pytest.mark.timeout(60)
def test_the_page_draws_in_a_real_browser_without_a_network(tmp_path: Path) -> None:
    write_run(tmp_path)
    result = drawn(write_report(tmp_path), tmp_path)
    assert result.stdout.count("<canvas") == 6
    assert "CONSOLE" not in result.stderr
    assert "rollback" in result.stdout


def test_a_run_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        write_report(tmp_path)


def test_a_run_that_has_only_begun_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert "interrupted" in write_report(tmp_path).read_text()
