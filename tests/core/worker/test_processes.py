import operator
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esper.core.worker import AsyncWorker, Outcome, RemoteError
from esper.leyline import CallCancelled, ChildDied, DeadlineExceeded
from support.calls import (
    Adder,
    close_standard_streams,
    double,
    exit_hard,
    gone,
    interrupt,
    own_pid,
    raise_that_needs_two,
    raise_unpicklable,
    return_unpicklable,
    return_what_breaks_on_arrival,
    return_what_breaks_when_sent,
    say,
    sleep,
    start_a_helper,
    until,
    write_pid_and_hang,
)


@pytest.fixture(scope="module")
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(preload=()) as made:
        yield made


def pid_in(path: Path) -> int:
    until(path.exists)
    return int(path.read_text())


def test_a_child_is_used_again(worker: AsyncWorker) -> None:
    first = worker.call(own_pid, timeout_s=20)
    assert [worker.call(own_pid, timeout_s=20) for _ in range(5)] == [first] * 5


def test_a_call_at_its_deadline_is_killed_and_reaped(worker: AsyncWorker, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    handle = worker.submit(write_pid_and_hang, str(path), timeout_s=1.0)
    process = pid_in(path)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert not psutil.pid_exists(process), "not even a zombie is left"
    assert worker.call(double, 2, timeout_s=20) == 4


def test_a_cancelled_call_is_killed(worker: AsyncWorker, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    handle = worker.submit(write_pid_and_hang, str(path), timeout_s=60)
    process = pid_in(path)
    handle.cancel()
    with pytest.raises(CallCancelled):
        handle.result()
    assert not psutil.pid_exists(process)
    assert worker.call(double, 2, timeout_s=20) == 4


def test_a_call_that_is_cancelled_at_any_moment_disturbs_no_other(worker: AsyncWorker) -> None:
    for number in range(60):
        handle = worker.submit(double, number, timeout_s=20)
        time.sleep(number % 20 * 1e-4)
        handle.cancel()
        assert worker.call(double, number, timeout_s=20) == 2 * number
        until(lambda handle=handle: handle.ended)
        assert handle.outcome in {Outcome.OK, Outcome.CANCELLED}


def test_what_a_call_started_is_killed_with_it(worker: AsyncWorker, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    handle = worker.submit(start_a_helper, str(path), timeout_s=1.0)
    helper = pid_in(path)
    assert not gone(helper)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: gone(helper))


@pytest.mark.parametrize("status", [0, 3])
def test_a_child_that_exits_is_told(worker: AsyncWorker, status: int) -> None:
    with pytest.raises(ChildDied, match=f"of exit_hard exited with status {status} before it"):
        worker.call(exit_hard, status, timeout_s=20)
    assert worker.call(double, 2, timeout_s=20) == 4


def test_a_child_that_is_interrupted_goes_on(worker: AsyncWorker) -> None:
    first = worker.call(own_pid, timeout_s=20)
    with pytest.raises(RuntimeError, match="interrupt raised KeyboardInterrupt"):
        worker.call(interrupt, timeout_s=20)
    os.kill(first, signal.SIGINT)
    assert worker.call(own_pid, timeout_s=20) == first


def test_an_exception_that_cannot_be_sent_is_told_as_text(worker: AsyncWorker) -> None:
    first = worker.call(own_pid, timeout_s=20)
    with pytest.raises(RemoteError, match="UnpicklableError: holds a function"):
        worker.call(raise_unpicklable, timeout_s=20)
    with pytest.raises(RemoteError, match="NeedsTwoError: 1 and 2"):
        worker.call(raise_that_needs_two, timeout_s=20)
    assert worker.call(own_pid, timeout_s=20) == first, "the child is none the worse"


def test_a_result_that_cannot_be_sent_is_an_error(worker: AsyncWorker) -> None:
    first = worker.call(own_pid, timeout_s=20)
    with pytest.raises(TypeError, match="the result cannot be sent to another process"):
        worker.call(return_unpicklable, timeout_s=20)
    with pytest.raises(TypeError, match=r"the result cannot be sent .*: no parts"):
        worker.call(return_what_breaks_when_sent, timeout_s=20)
    with pytest.raises(RemoteError, match="cannot be put together"):
        worker.call(return_what_breaks_on_arrival, timeout_s=20)
    assert worker.call(own_pid, timeout_s=20) == first


def test_an_argument_that_breaks_on_arrival_is_an_error(worker: AsyncWorker) -> None:
    with pytest.raises(ValueError, match="cannot be put together"):
        worker.call(double, return_what_breaks_on_arrival(), timeout_s=20)


def test_a_remote_error_shows_where_it_was_raised(worker: AsyncWorker) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        worker.call(operator.truediv, 1, 0, timeout_s=20)
    assert "in the child process" in raised.value.__notes__[0]


def test_a_child_without_standard_streams_goes_on(worker: AsyncWorker) -> None:
    assert worker.call(close_standard_streams, timeout_s=20) == "closed"
    assert worker.call(double, 2, timeout_s=20) == 4


def test_large_objects_that_are_no_tensors_are_sent_as_well(worker: AsyncWorker) -> None:
    data = os.urandom(20_000_000)
    assert worker.call(double, data, timeout_s=20) == data * 2


def test_methods_and_coroutines_run_in_children(worker: AsyncWorker) -> None:
    assert worker.call(Adder(1).add, 2, timeout_s=20) == 3
    assert worker.call(sleep, 0.01, timeout_s=20, isolation="process") == 0.01


def test_what_a_child_prints_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    with AsyncWorker(preload=()) as worker:
        worker.call(say, "hello", timeout_s=20)
        until(lambda: "hello" in capfd.readouterr().out)


def test_a_child_works_where_the_program_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_for_this.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import made_up_for_this  # type: ignore[import-not-found]

    with AsyncWorker(preload=()) as worker:
        assert worker.call(made_up_for_this.answer, timeout_s=20) == 42
        assert worker.call(os.getcwd, timeout_s=20) == str(tmp_path)


def test_a_directory_that_is_gone_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with AsyncWorker(preload=()) as worker:
        worker.call(double, 1, timeout_s=20)
        monkeypatch.chdir(place)
        place.rmdir()
        with pytest.raises(ChildDied):
            worker.call(exit_hard, 1, timeout_s=20)
        assert worker.call(double, 2, timeout_s=20) == 4


def test_a_worker_may_be_warmed_up() -> None:
    with AsyncWorker(preload=()) as worker:
        worker.warm_up()
        until(lambda: worker.stats().children == 1)
        assert worker.call(double, 2, timeout_s=20) == 4
        assert worker.stats().children == 1
    assert worker.stats().children == 0


def test_a_worker_that_is_closed_while_it_starts_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    began = time.monotonic()
    for delay in (0.0, 0.01, 0.05, 0.1, 0.15, 0.2):
        worker = AsyncWorker(preload=("torch",))
        worker.warm_up()
        time.sleep(delay)
        worker.shutdown(0)
    assert time.monotonic() - began < 10
    until(lambda: {c.pid for c in psutil.Process().children(recursive=True)} <= before)


def test_a_deadline_before_the_first_process_is_there_holds() -> None:
    with AsyncWorker(preload=("torch",)) as worker:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            worker.call(double, 1, timeout_s=0.02)
        assert time.monotonic() - began < 5
        assert worker.call(double, 2, timeout_s=20) == 4


def test_a_program_with_many_open_files_can_use_it(tmp_path: Path) -> None:
    files = [open("/dev/null", "rb") for _ in range(1100)]  # noqa: SIM115
    try:
        with AsyncWorker(preload=()) as worker:
            assert worker.call(double, 2, timeout_s=20) == 4
            with pytest.raises(ChildDied):
                worker.call(exit_hard, 1, timeout_s=20)
            assert worker.call(double, 2, timeout_s=20) == 4
    finally:
        for file in files:
            file.close()
