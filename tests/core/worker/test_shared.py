import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.core.config import WorkerConfig
from esper.core.worker import make_worker, shared_worker
from esper.leyline import ConfigError, WorkerClosed
from support.calls import echo

TESTS = Path(__file__).parents[2]


def test_a_process_has_one_worker_until_it_is_shut_down() -> None:
    worker = shared_worker()
    try:
        assert shared_worker() is worker
        assert shared_worker(WorkerConfig()) is worker
        with pytest.raises(ConfigError, match="shut it down first, or hand in"):
            shared_worker(WorkerConfig(max_concurrency=3))
        assert worker.call(echo, 1, timeout_s=10) == 1
    finally:
        worker.shutdown()
    with pytest.raises(WorkerClosed):
        worker.submit(echo, 1, timeout_s=10)
    other = shared_worker(WorkerConfig(max_concurrency=3))
    try:
        assert other is not worker
        assert other.max_concurrency == 3
        with pytest.raises(ConfigError):
            shared_worker(WorkerConfig())
    finally:
        other.shutdown()


def test_a_worker_is_made_as_it_is_configured() -> None:
    with make_worker(WorkerConfig(max_concurrency=2, grace_ms=10)) as worker:
        assert worker.max_concurrency == 2
        assert worker._grace_s == 0.01


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    worker = shared_worker()
    try:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = shared_worker()
                status = 0 if own is not worker and own.call(echo, 1, timeout_s=10) == 1 else 2
                own.shutdown()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        worker.shutdown()


def run(path: Path, code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a script, which prints the monotonic time at its end."""
    path.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic()


STUCK = """
import asyncio
import threading
import time
from esper.core.worker import AsyncWorker, shared_worker
from support.calls import double, loop_for_ever, until

worker = {worker}
ready = threading.Semaphore(0)

def wait():
    ready.release()
    time.sleep(60)

async def block():
    ready.release()
    time.sleep(60)

async def swallow():
    ready.release()
    while True:
        try:
            await asyncio.sleep(60)
        except {swallowed}:
            pass

async def look_up():
    await asyncio.to_thread(wait)

if {process}:
    worker.call(double, 1, timeout_s=30)
worker.submit(*{call}, timeout_s={timeout_s})
if {process}:
    time.sleep(0.1)
else:
    ready.acquire(timeout=2)
time.sleep(0.05)
print(time.monotonic())
"""


STUCK_CALLS = [
    ("(wait,)", 0.01),
    ("(wait,)", 60),
    ("(block,)", 60),
    ("(swallow,)", 0.01),
    ("(swallow, )", 60),
    ("(look_up,)", 60),
    ("(loop_for_ever,)", 60),
]


@pytest.mark.parametrize("worker", ["shared_worker()", "AsyncWorker(preload=())"])
@pytest.mark.parametrize(("call", "timeout_s"), STUCK_CALLS)
def test_a_stuck_call_does_not_keep_the_program_from_ending(
    tmp_path: Path, worker: str, call: str, timeout_s: float
) -> None:
    thread = "isolation='thread', " if "wait," in call else ""
    code = STUCK.format(
        worker=worker,
        call=call,
        timeout_s=f"{timeout_s}, {thread}".rstrip(", "),
        process="loop" in call,
        swallowed="BaseException" if call == "(swallow, )" else "asyncio.CancelledError",
    )
    done, ended = run(tmp_path / "script.py", code)
    assert done.stderr == ""
    assert done.returncode == 0
    # Expected is well below a second; the machine may be busy.
    assert ended - float(done.stdout) < 8


def test_a_script_without_a_guard_is_not_run_twice(tmp_path: Path) -> None:
    code = """
import time
from esper.core.worker import AsyncWorker
from support.calls import double

print("run")

def local(x):
    return x

worker = AsyncWorker(preload=())
print(worker.call(double, 2, timeout_s=30))
try:
    worker.call(local, 2, timeout_s=30)
except TypeError as error:
    print(error)
worker.shutdown()
"""
    done, _ = run(tmp_path / "script.py", code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "run",
        "4",
        "local cannot be sent to another process: local is defined in the main script, which a "
        "child process does not run; move it to a module; or use isolation='thread' if it is sure "
        "to return",
    ]


def test_forks_of_multiprocessing_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    code = """
import multiprocessing
import warnings
from esper.core.worker import AsyncWorker
from esper.leyline import WorkerClosed
from support.calls import double, echo

warnings.simplefilter("ignore")
worker = AsyncWorker(preload=())

def work():
    try:
        worker.submit(echo, 1, timeout_s=1)
    except WorkerClosed:
        print("refused", flush=True)

if __name__ == "__main__":
    worker.call(echo, 1, timeout_s=10)
    worker.call(double, 1, timeout_s=30)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    print(process.exitcode, worker.call(double, 2, timeout_s=10))
"""
    done, _ = run(tmp_path / "script.py", code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["refused", "0 4"]
