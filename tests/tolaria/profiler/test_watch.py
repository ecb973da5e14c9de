import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset

from esper.core.config import ProfilerConfig, TolariaConfig
from esper.leyline import ConfigError, Event
from esper.tolaria import TolariaTrainer
from esper.tolaria.profiler import RequestBox
from esper.tolaria.profiler.recording import preload
from esper.tolaria.profiler.requests import Reply
from support.jobs import config, two_task_data, two_task_job
from support.sinks import Memory


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    # So that no run waits for it.
    preload()


def with_profiler(epochs: int = 3, **settings: Any) -> TolariaConfig:
    made = config(train={"epochs": epochs})
    return made.model_copy(update={"profiler": ProfilerConfig(**settings)})


def spans_of(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}


def events_of(theirs: profile) -> list[Any]:
    assert theirs.profiler is not None
    assert theirs.profiler.kineto_results is not None
    return theirs.profiler.kineto_results.events()


def traces_in(run: Path) -> list[Path]:
    return sorted((run / "profiles").glob("*.pt.trace.json"))


def train(run: Path, settings: TolariaConfig, **changes: Any) -> tuple[TolariaTrainer, Memory]:
    memory = Memory()
    job = two_task_job(**changes)
    trainer = TolariaTrainer.from_job(job, config=settings, directory=run, sinks=[memory])
    for _ in trainer.run():
        pass
    return trainer, memory


def train_until_reply(run: Path, name: str, epochs: int = 10_000) -> tuple[Reply, Memory]:
    memory, box = Memory(), RequestBox(run)
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=with_profiler(epochs), directory=run, sinks=[memory]
    )
    for _ in trainer.steps():
        if (reply := box.fetch(name)) is not None:
            break
    else:
        pytest.fail("there was no reply")
    return reply, memory


def test_a_scheduled_window_is_recorded_under_the_runs_own_step_numbers(tmp_path: Path) -> None:
    settings = with_profiler(epochs=10, wait=2, warmup=1, active=3)
    trainer, memory = train(tmp_path, settings)
    (saved,) = memory.events("profile_saved")
    (path,) = traces_in(tmp_path)
    assert saved.data["path"] == str(path)
    assert saved.data["steps"] == 3
    assert saved.data["cause"] == "scheduled"
    numbers = sorted(int(span.partition("#")[2]) for span in spans_of(path))
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    metrics = trainer.metrics_snapshot()
    assert metrics["tolaria.profiler.traces_total"] == 1
    assert metrics["tolaria.profiler.failed_total"] == 0
    assert metrics["tolaria.profiler.export_ms"] > 0
    assert metrics["tolaria.profiler.overhead_ms"] > 0


def test_a_run_that_ends_in_the_window_leaves_what_was_recorded(tmp_path: Path) -> None:
    train(tmp_path, with_profiler(epochs=6, active=100_000))
    (path,) = traces_in(tmp_path)
    assert len(spans_of(path)) > 1


def test_a_run_that_ends_before_the_window_says_so(tmp_path: Path) -> None:
    _, memory = train(tmp_path, with_profiler(epochs=1, wait=1000, active=3))
    (failed,) = memory.events("profile_failed")
    assert failed.data["reason"] == "the run ended before the window opened"


def test_weights_are_the_same_with_and_without(tmp_path: Path) -> None:
    def weights(name: str, settings: TolariaConfig) -> torch.Tensor:
        trainer, _ = train(tmp_path / name, settings)
        return torch.cat([p.detach().flatten() for p in trainer.job.model.parameters()])

    plain = weights("plain", with_profiler(enabled=False))
    assert torch.equal(plain, weights("profiled", with_profiler(active=3, repeat=5)))
    with profile(activities=[ProfilerActivity.CPU]):
        assert torch.equal(plain, weights("refused", with_profiler(active=3, repeat=5)))


def test_somebody_elses_profiler_is_left_alone_and_the_failure_told(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        trainer, memory = train(tmp_path, with_profiler(epochs=10, active=3))
    assert "aten::linear" in {event.name() for event in events_of(theirs)}
    (failed,) = memory.events("profile_failed")
    assert "another profiler is in use" in failed.data["reason"]
    assert trainer.metrics_snapshot()["tolaria.profiler.failed_total"] == 1


def test_a_request_from_outside_is_answered_with_the_trace(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    reply, memory = train_until_reply(tmp_path, box.ask(4, timeout_s=60))
    assert reply.steps == 4
    assert len(spans_of(Path(reply.path))) == 4
    assert reply.bytes == Path(reply.path).stat().st_size
    assert memory.events("profile_saved")[0].data["cause"] == "requested"


def test_several_requests_are_answered_one_after_the_other(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    first, second = box.ask(2, timeout_s=60), box.ask(3, timeout_s=60)
    reply, _ = train_until_reply(tmp_path, second)
    earlier = box.fetch(first)
    assert earlier is not None
    assert (earlier.steps, reply.steps) == (2, 3)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_request_out_of_range_is_refused(tmp_path: Path, steps: int) -> None:
    box = RequestBox(tmp_path)
    box.open()
    reply, _ = train_until_reply(tmp_path, box.ask(steps, timeout_s=60))
    assert "ask for 1 to 1000" in reply.error


def test_a_request_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    (box.folder / "request-1-1.json").write_text("{half")
    reply, memory = train_until_reply(tmp_path, box.ask(1, timeout_s=60))
    assert reply.steps == 1
    (failed,) = memory.events("profile_failed")
    assert "request-1-1.json cannot be read" in failed.data["reason"]


def test_a_request_taken_back_in_time_has_no_effect(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    box.forget(box.ask(3, timeout_s=60))
    box.ask(3, timeout_s=-1)
    train(tmp_path, with_profiler(epochs=20))
    assert not box.folder.parent.exists(), "neither traces nor requests are left"


def test_a_request_taken_back_while_it_is_recorded_ends_the_recording(tmp_path: Path) -> None:
    memory, box = Memory(), RequestBox(tmp_path)
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=with_profiler(10_000), directory=tmp_path, sinks=[memory]
    )
    name, end = box.ask(1000, timeout_s=60), time.monotonic() + 10
    for record in trainer.steps():
        if record.step == 100:
            box.forget(name)
        if memory.events("profile_dropped") or time.monotonic() > end:
            break
    assert memory.events("profile_dropped")
    assert traces_in(tmp_path) == []
    assert memory.events("profile_failed") == []


def test_a_run_that_ends_answers_who_still_waits(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    trainer = TolariaTrainer.from_job(two_task_job(), config=with_profiler(), directory=tmp_path)
    steps = trainer.steps()
    next(steps)
    name = box.ask(3, timeout_s=60)
    steps.close()
    reply = box.fetch(name)
    assert reply is not None
    assert reply.error == "the run has ended"


def test_no_more_traces_than_allowed(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    box.open()
    for number in range(8):
        (tmp_path / "profiles" / f"{number}.pt.trace.json").touch()
    reply, memory = train_until_reply(tmp_path, box.ask(1, timeout_s=60))
    assert "profiler.max_traces is 8" in reply.error
    assert len(memory.events("profile_failed")) == 1
    assert len(traces_in(tmp_path)) == 8


@pytest.mark.fault
def test_a_directory_that_goes_away_is_told_and_training_goes_on(tmp_path: Path) -> None:
    memory = Memory()
    settings = with_profiler(epochs=10, active=20)
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=settings, directory=tmp_path, sinks=[memory]
    )
    for record in trainer.steps():
        if record.step == 5:
            shutil.rmtree(tmp_path / "profiles")
    assert trainer.outcome == "completed"
    reasons = [event.data["reason"] for event in memory.events("profile_failed")]
    assert any("the directory is gone" in reason for reason in reasons)
    assert any("cannot be asked for any more" in reason for reason in reasons)
    assert len(reasons) == 2


class SlowLater(Dataset[Any]):
    """Data that take long to fetch from a certain item on."""

    def __init__(self, fetches: int) -> None:
        self._data = two_task_data()
        self._left = fetches

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        self._left -= 1
        if self._left < 0:
            time.sleep(0.01)
        return self._data[index]


def test_slow_steps_raise_an_alarm_and_are_profiled(tmp_path: Path) -> None:
    # Batches of 16: from step 300 on each takes 160 ms longer, for good. The limits are wide, so
    # that a busy machine raises no alarm of its own.
    settings = with_profiler(epochs=20, slow_step_factor=10.0, slow_step_patience=5)
    _, memory = train(tmp_path, settings, data=SlowLater(300 * 16))
    (alarm,) = memory.events("slow_step")
    assert alarm.data["milliseconds"] > 10 * alarm.data["median_ms"]
    assert 304 <= alarm.data["step"] <= 310
    (saved,) = memory.events("profile_saved")
    assert saved.data["cause"] == "slow_step"
    assert saved.data["steps"] == 5


def test_a_schedule_without_a_directory_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"profiler.active is 3, but this run has no directory"):
        TolariaTrainer.from_job(two_task_job(), config=with_profiler(active=3))
    TolariaTrainer.from_job(two_task_job(), config=with_profiler())


def test_a_directory_for_no_traces_fails_only_a_schedule(tmp_path: Path) -> None:
    (tmp_path / "profiles").touch()
    with pytest.raises(ConfigError, match="traces cannot be written"):
        train(tmp_path, with_profiler(active=3))
    _, memory = train(tmp_path, with_profiler())
    failed: list[Event] = memory.events("profile_failed")
    assert "no step of this run can be profiled" in failed[0].message
