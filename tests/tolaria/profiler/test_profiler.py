import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.profiler._trace_validator import validate_trace

from esper.core.worker import AsyncWorker
from esper.leyline import ConfigError
from esper.tolaria.profiler import Profiler, ProfilerError, Window


def take_step(model: nn.Module) -> None:
    model(torch.randn(4, 8)).sum().backward()


def train(profiler: Profiler, steps: int) -> None:
    model = nn.Linear(8, 8)
    with profiler:
        for _ in range(steps):
            take_step(model)
            profiler.step()


def events_of(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def spans_of(path: Path) -> list[str]:
    named = {event["name"] for event in events_of(path)}
    return sorted(name for name in named if name.startswith("ProfilerStep#"))


def test_it_records_the_active_steps_only(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, window=Window(wait=1, warmup=2, active=3))
    train(profiler, 10)
    (trace,) = profiler.traces
    assert trace.steps == 3
    assert trace.bytes == trace.path.stat().st_size
    assert spans_of(trace.path) == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    operators = [event["name"] for event in events_of(trace.path)]
    assert operators.count("aten::linear") == 3
    assert [path.name for path in tmp_path.iterdir()] == [trace.path.name]


def test_the_trace_is_valid_for_torch_and_for_perfetto(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    train(profiler, 8)
    path = profiler.traces[0].path
    assert path.name.endswith(".pt.trace.json")
    assert validate_trace(str(path)) == (True, [])
    complete = [event for event in events_of(path) if event["ph"] == "X"]
    assert complete
    for event in complete:
        assert event["dur"] >= 0
        assert {"name", "ts", "pid", "tid"} <= event.keys()


def test_every_cycle_has_its_own_trace(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, run="my run", window=Window(1, 1, 2, repeat=3))
    train(profiler, 20)
    assert [trace.steps for trace in profiler.traces] == [2, 2, 2]
    assert len({trace.path for trace in profiler.traces}) == 3
    assert all(trace.path.name.startswith("my-run-") for trace in profiler.traces)


def test_a_loop_that_ends_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, window=Window(warmup=1, active=50))
    train(profiler, 4)
    # The fourth call of step() has begun a fifth step, in which nothing happened.
    assert profiler.traces[0].steps == 3
    assert "ProfilerStep#3" in spans_of(profiler.traces[0].path)


def test_an_error_in_the_loop_leaves_what_was_recorded(tmp_path: Path) -> None:
    def fail_at_the_fifth(profiler: Profiler) -> None:
        with profiler:
            for number in range(4, -1, -1):
                1 / number
                take_step(nn.Linear(8, 8))
                profiler.step()

    profiler = Profiler(tmp_path, window=Window(warmup=0, active=50))
    with pytest.raises(ZeroDivisionError):
        fail_at_the_fifth(profiler)
    assert profiler.traces[0].steps == 4


@pytest.mark.parametrize("window", [Window(wait=5), Window(warmup=5)])
def test_a_loop_too_short_for_its_window_is_told_so(tmp_path: Path, window: Window) -> None:
    with pytest.raises(ProfilerError, match=r"nothing (was )?recorded"):
        train(Profiler(tmp_path, window=window), 2)
    assert list(tmp_path.iterdir()) == []
    train(Profiler(tmp_path), 7)


def test_no_directory_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="a profiler needs a directory"):
        Profiler(None)


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"traces cannot be written into .*file/profiles"):
        Profiler(tmp_path / "file" / "profiles")


def test_another_profiler_in_use_is_told_and_not_disturbed(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        with pytest.raises(ProfilerError, match="another profiler is in use"):
            train(Profiler(tmp_path), 3)
        torch.ones(3).sum()
    assert "aten::sum" in {event.key for event in theirs.key_averages()}


def test_another_profiler_in_use_on_another_thread_is_told(tmp_path: Path) -> None:
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with profile(activities=[ProfilerActivity.CPU]):
            begun.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(10)
    try:
        with pytest.raises(ProfilerError, match="another profiler is in use"):
            train(Profiler(tmp_path), 3)
    finally:
        done.set()
        thread.join()


def test_two_profilers_at_once_are_refused(tmp_path: Path) -> None:
    with Profiler(tmp_path, window=Window(active=1)) as first:
        second = Profiler(tmp_path)
        with pytest.raises(ProfilerError, match="another profile of this process"):
            second.__enter__()
        first.step()
        take_step(nn.Linear(8, 8))
        first.step()
    assert len(first.traces) == 1


def test_a_profiler_that_is_ended_by_another_one_is_told(tmp_path: Path) -> None:
    failures: list[ProfilerError] = []
    with Profiler(tmp_path, window=Window(warmup=0, active=2), report=failures.append) as ours:
        with profile(activities=[ProfilerActivity.CPU]):
            take_step(nn.Linear(8, 8))
        ours.step()
        ours.step()
    assert "another profiler was started and stopped meanwhile" in str(failures[0])
    assert ours.traces == []
    train(Profiler(tmp_path), 7)


def test_a_directory_that_goes_away_is_told(tmp_path: Path) -> None:
    failures: list[ProfilerError] = []
    profiler = Profiler(tmp_path / "profiles", report=failures.append)
    (tmp_path / "profiles").rmdir()
    train(profiler, 8)
    assert "the directory is gone" in str(failures[0])
    assert profiler.failed == 1
    assert profiler.traces == []


@pytest.mark.fault
def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs rights that this user has not")
    try:
        with pytest.raises(ProfilerError, match="bytes are free"):
            train(Profiler(disk, window=Window(active=100)), 120)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_worker_writes_beside_the_loop_and_holds_the_next_cycle(tmp_path: Path) -> None:
    with AsyncWorker(preload=()) as worker:
        profiler = Profiler(tmp_path, window=Window(0, 0, 1, repeat=3), worker=worker)
        model = nn.Linear(8, 8)
        with profiler:
            while profiler.active:
                take_step(model)
                profiler.step()
        assert [trace.steps for trace in profiler.traces] == [1, 1, 1]
        assert worker.stats().calls["tolaria.profiler"].outcomes["ok"] == 3


def test_a_worker_that_is_closed_does_not_lose_the_trace(tmp_path: Path) -> None:
    worker = AsyncWorker(preload=())
    worker.shutdown()
    profiler = Profiler(tmp_path, worker=worker)
    train(profiler, 8)
    assert len(profiler.traces) == 1


NAMES = """
from esper.tolaria.profiler import trace_name
for number in range(200):
    print(trace_name("job", 0))
"""


def test_names_are_unique_in_and_across_processes() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", NAMES], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert len(set(names)) == 400


def test_weights_are_the_same_with_and_without(tmp_path: Path) -> None:
    def weights(profiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        profiler = Profiler(tmp_path, window=Window(0, 1, 2, repeat=2))
        if profiled:
            profiler.__enter__()
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            profiler.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(True), weights(False))


def test_time_stands_in_the_name(tmp_path: Path) -> None:
    before = time.strftime("%Y%m%d", time.gmtime())
    profiler = Profiler(tmp_path)
    train(profiler, 8)
    assert f"run-{before}T" in profiler.traces[0].path.name or before != time.strftime(
        "%Y%m%d", time.gmtime()
    )
