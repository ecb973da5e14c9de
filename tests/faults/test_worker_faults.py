"""The worker under real faults: kills, stops, endless C calls, no memory, a program that dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from esper.core.worker import AsyncWorker, Outcome, WorkerHandle
from esper.leyline import ChildDied, DeadlineExceeded
from support.calls import (
    answer_large_then_stop,
    double,
    eat_memory,
    gone,
    ignore_sigterm_and_hang,
    kill_oneself,
    late_by,
    loop_for_ever,
    own_pid,
    pause_holding_the_gil,
    state_of,
    until,
    write_pid_and_hang,
)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(90)]


@pytest.fixture
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(preload=()) as made:
        assert made.call(double, 1, timeout_s=30) == 2
        yield made


def goes_on(worker: AsyncWorker) -> bool:
    """Whether the next call works, all slots are free, and no child of ours is a zombie."""
    assert worker.call(double, 21, timeout_s=30) == 42
    until(lambda: not worker.stats().live)
    return not [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if state_of(child.pid) == "Z"
    ]


def server_of(worker: AsyncWorker) -> int:
    server = worker._processes._server._server
    assert server is not None
    return server.pid


def hang(
    worker: AsyncWorker, path: Path, function: Any = write_pid_and_hang
) -> tuple[WorkerHandle[Any], int]:
    handle = worker.submit(function, str(path), timeout_s=60)
    until(path.exists)
    return handle, int(path.read_text())


@pytest.mark.parametrize("function", [pause_holding_the_gil, loop_for_ever])
def test_a_call_that_never_returns_is_killed_at_its_deadline(
    worker: AsyncWorker, function: Any
) -> None:
    overruns = []
    for _ in range(5):
        began = time.monotonic()
        handle = worker.submit(function, timeout_s=0.2)
        with pytest.raises(DeadlineExceeded):
            handle.result()
        until(lambda handle=handle: handle.ended)
        overruns.append(time.monotonic() - began - 0.2)
        assert goes_on(worker)
    print(f"killed and reaped after {max(overruns) * 1e3:.1f} ms at most")  # noqa: T201
    assert max(overruns) < 3


def test_a_c_call_that_never_returns_is_killed(worker: AsyncWorker) -> None:
    with pytest.raises(DeadlineExceeded):
        worker.call(late_by, 1e6, timeout_s=0.2)
    assert goes_on(worker)


def test_a_child_that_ignores_sigterm_is_killed(worker: AsyncWorker, tmp_path: Path) -> None:
    handle, process = hang(worker, tmp_path / "pid", ignore_sigterm_and_hang)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.05)
    assert not gone(process)
    handle.cancel()
    until(lambda: handle.ended)
    assert not psutil.pid_exists(process)
    assert goes_on(worker)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 1])
def test_a_child_that_somebody_kills_in_mid_call_is_told(
    worker: AsyncWorker, tmp_path: Path, number: int
) -> None:
    handle, process = hang(worker, tmp_path / "pid")
    os.kill(process, number)
    with pytest.raises(ChildDied, match=r"of write_pid_and_hang was ended by (S|signal )"):
        handle.result()
    assert handle.outcome is Outcome.ERROR
    assert goes_on(worker)


def test_a_child_that_somebody_kills_while_idle_is_replaced(worker: AsyncWorker) -> None:
    for _ in range(5):
        process = worker.call(own_pid, timeout_s=30)
        os.kill(process, signal.SIGKILL)
        until(lambda process=process: gone(process))
        assert goes_on(worker)


def test_a_child_that_is_stopped_in_mid_call_is_killed(worker: AsyncWorker, tmp_path: Path) -> None:
    handle = worker.submit(write_pid_and_hang, str(tmp_path / "pid"), timeout_s=1.0)
    until((tmp_path / "pid").exists)
    process = int((tmp_path / "pid").read_text())
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert not psutil.pid_exists(process)
    assert goes_on(worker)


@pytest.mark.parametrize("size", [10, 50_000_000])
def test_a_child_that_is_stopped_while_idle_costs_one_call(worker: AsyncWorker, size: int) -> None:
    process = worker.call(own_pid, timeout_s=30)
    os.kill(process, signal.SIGSTOP)
    # The large one does not fit into the socket: it is the sending that does not end.
    began = time.monotonic()
    handle = worker.submit(double, bytes(size), timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(process)
    assert goes_on(worker)


def test_a_child_that_is_stopped_in_the_midst_of_its_answer_is_killed_on_time(
    worker: AsyncWorker,
) -> None:
    began = time.monotonic()
    handle = worker.submit(answer_large_then_stop, 300_000_000, timeout_s=1.5)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert time.monotonic() - began < 10
    assert goes_on(worker)


def test_a_call_that_eats_all_memory_is_an_error(worker: AsyncWorker) -> None:
    with pytest.raises(MemoryError):
        worker.call(eat_memory, 2**32, timeout_s=30)
    assert goes_on(worker)


def test_a_call_that_kills_itself_is_told(worker: AsyncWorker) -> None:
    with pytest.raises(ChildDied, match=r"ended by SIGKILL \(the system kills so when memory"):
        worker.call(kill_oneself, timeout_s=30)
    assert goes_on(worker)


def test_a_fork_server_that_is_killed_while_idle_is_replaced(worker: AsyncWorker) -> None:
    for _ in range(3):
        server, child = server_of(worker), worker.call(own_pid, timeout_s=30)
        os.kill(server, signal.SIGKILL)
        until(lambda child=child: gone(child))
        assert goes_on(worker)
        assert server_of(worker) != server


def test_a_fork_server_that_is_killed_in_mid_call_is_replaced(
    worker: AsyncWorker, tmp_path: Path
) -> None:
    handle, process = hang(worker, tmp_path / "pid")
    os.kill(server_of(worker), signal.SIGKILL)
    with pytest.raises(ChildDied, match="of write_pid_and_hang ended before it answered"):
        handle.result()
    until(lambda: gone(process))
    assert goes_on(worker)


def test_a_fork_server_that_is_killed_as_it_starts_is_replaced() -> None:
    with AsyncWorker(preload=("torch",)) as worker:
        worker.warm_up()
        until(lambda: worker._processes._server._server is not None)
        time.sleep(0.05)
        os.kill(server_of(worker), signal.SIGKILL)
        assert worker.call(double, 2, timeout_s=60) == 4


def test_calls_go_on_while_children_are_killed_at_random(worker: AsyncWorker) -> None:
    stop = threading.Event()
    killed: set[int] = set()

    def kill_some() -> None:
        while not stop.wait(0.02):
            for child in psutil.Process(server_of(worker)).children():
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGKILL)
                    killed.add(child.pid)

    killer = threading.Thread(target=kill_some)
    killer.start()
    died = 0
    try:
        for number in range(150):
            try:
                assert worker.call(double, number, timeout_s=30) == 2 * number
            except ChildDied:
                died += 1
    finally:
        stop.set()
        killer.join(10)
    outcomes = worker.stats().outcomes
    assert outcomes[Outcome.ERROR] == died
    assert outcomes.total() == 151
    # One that is about to die may be given a call.
    until(lambda: all(gone(process) for process in killed))
    assert goes_on(worker)


PROGRAM = """
import os
import sys
import time
from esper.core.worker import AsyncWorker
from support.calls import double, own_pid, pause_holding_the_gil

worker = AsyncWorker(preload=())
children = [worker.call(own_pid, timeout_s=30), worker._processes._server._server.pid]
if sys.argv[1] == "with-fork":
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
else:
    print(0, flush=True)
worker.submit(pause_holding_the_gil, timeout_s=600)
time.sleep(0.1)
print(*children, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["plain", "with-fork"])
def test_no_process_outlives_a_program_that_is_killed(how: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], env=environment, stdout=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        forked = int(program.stdout.readline())
        processes = [int(number) for number in program.stdout.readline().split()]
        assert len(processes) == 2
        assert not any(gone(process) for process in processes)
        program.kill()
        try:
            until(lambda: all(gone(process) for process in processes))
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_process_outlives_a_program_that_is_told_to_end(number: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "plain"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with program:
        assert program.stdout is not None
        program.stdout.readline()
        processes = [int(number) for number in program.stdout.readline().split()]
        os.killpg(program.pid, number)
        program.wait(20)
        until(lambda: all(gone(process) for process in processes))
