"""Calls under deadlines, beside other ways to make them: round trips, overruns, what is left.

Rounds of all ways are interleaved in one process; figures are medians. The goals are those of
docs/benchmarks.md.
"""

import argparse
import asyncio
import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.from_thread
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))

from calls import functions
from esper.core import AsyncWorker, DeadlineExceeded

try:
    import pebble
except ImportError:
    pebble = None

DEADLINE_S = 0.02
Arm = Callable[[], object]


class LoopThread:
    """An event loop on a thread, used by hand: the baseline."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, timeout_s: float = 1.0) -> object:
        return asyncio.run_coroutine_threadsafe(functions.nothing_async(), self.loop).result(
            timeout_s
        )

    def overrun(self) -> None:
        future = asyncio.run_coroutine_threadsafe(functions.sleep_async(1.0), self.loop)
        with suppress(FutureTimeoutError):
            future.result(DEADLINE_S)
        future.cancel()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def medians(arms: dict[str, Arm], rounds: int) -> dict[str, float]:
    """Return the median seconds of each arm; one call of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, rows: list[tuple[str, str, str]]) -> None:
    print(f"\n{title}")
    for name, figure, remark in rows:
        print(f"  {name:<48} {figure:>14}  {remark}")


def per_call_executor() -> object:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(functions.nothing).result(1.0)


def round_trips(worker: AsyncWorker, rounds: int) -> None:
    """Time no-ops there and back."""
    loop, shared = LoopThread(), ThreadPoolExecutor(4)
    with anyio.from_thread.start_blocking_portal() as portal:
        arms: dict[str, Arm] = {
            "event loop, run_coroutine_threadsafe (baseline)": loop.call,
            "esper, coroutine": lambda: worker.call(functions.nothing_async, timeout_s=1.0),
            "anyio portal, call": lambda: portal.call(functions.nothing_async),
            "anyio portal, start_task_soon": lambda: portal.start_task_soon(
                functions.nothing_async
            ).result(1.0),
            "esper, thread": lambda: worker.call(
                functions.nothing, timeout_s=1.0, isolation="thread"
            ),
            "shared ThreadPoolExecutor": lambda: shared.submit(functions.nothing).result(1.0),
            "ThreadPoolExecutor for each call": per_call_executor,
            "esper, process": lambda: worker.call(functions.nothing, timeout_s=30.0),
        }
        pool = pebble.ProcessPool(max_workers=1) if pebble is not None else None
        if pool is not None:
            arms["pebble, process"] = lambda: pool.schedule(functions.nothing).result(30.0)
        found = medians(arms, rounds)
        if pool is not None:
            pool.stop()
            pool.join()
    loop.close()
    shared.shutdown()
    base = found["event loop, run_coroutine_threadsafe (baseline)"]
    rows = [(name, f"{s * 1e6:.0f} us", f"{s / base:.2f} x baseline") for name, s in found.items()]
    table("Round trip of a call that does nothing (goal: esper's coroutine <= 1.2)", rows)


def polls(worker: AsyncWorker, rounds: int) -> None:
    """Time a look whether a running call is done."""
    handle = worker.submit(functions.sleep_async, 5.0, timeout_s=10.0)
    future: Future[None] = Future()
    many = rounds * 100

    def each(look: Callable[[], bool]) -> float:
        began = time.perf_counter()
        for _ in range(many):
            look()
        return (time.perf_counter() - began) / many

    rows = [
        ("esper, handle.done()", f"{each(handle.done) * 1e6:.2f} us", "goal: <= 1"),
        ("concurrent.futures, future.done()", f"{each(future.done) * 1e6:.2f} us", ""),
    ]
    handle.cancel()
    table("A look at a call that is under way", rows)


def overruns(worker: AsyncWorker, rounds: int) -> None:
    """Time how long after its deadline a caller is let go, and count what runs on."""
    loop = LoopThread()
    worker.call(functions.nothing, timeout_s=60.0)

    def late(function: Callable[..., object], isolation: str | None, *arguments: object) -> Arm:
        def arm() -> None:
            with suppress(DeadlineExceeded):
                worker.call(function, *arguments, timeout_s=DEADLINE_S, isolation=isolation)

        return arm

    def executor_in_with() -> None:
        with ThreadPoolExecutor(1) as executor, suppress(FutureTimeoutError):
            executor.submit(time.sleep, 0.3).result(DEADLINE_S)

    def executor_left() -> None:
        executor = ThreadPoolExecutor(1)
        with suppress(FutureTimeoutError):
            executor.submit(time.sleep, 0.3).result(DEADLINE_S)
        executor.shutdown(wait=False)

    arms: dict[str, Arm] = {
        "esper, coroutine (goal: <= 2 ms)": late(functions.sleep_async, None, 1.0),
        "esper, thread that asks": late(functions.ask, "thread", 1.0),
        "esper, process that spins (goal: <= 15 ms)": late(functions.spin, "process"),
        "event loop by hand": loop.overrun,
        "ThreadPoolExecutor in with (0.3 s call)": executor_in_with,
        "ThreadPoolExecutor, shutdown(wait=False)": executor_left,
    }
    pool = pebble.ProcessPool(max_workers=1) if pebble is not None else None
    if pool is not None:

        def pebble_late() -> None:
            with suppress(FutureTimeoutError):
                pool.schedule(functions.spin, timeout=DEADLINE_S).result()

        arms["pebble, process"] = pebble_late
    rows = []
    for name, arm in arms.items():
        arm()
        times = []
        before = len(threading.enumerate())
        for _ in range(rounds):
            time.sleep(0.06)  # a process that was killed is replaced meanwhile
            began = time.perf_counter()
            arm()
            times.append(time.perf_counter() - began - DEADLINE_S)
        left = len(threading.enumerate()) - before
        figure = f"{statistics.median(times) * 1e3:.1f} ms"
        rows.append((name, figure, f"{left} threads more afterwards" if left > 0 else ""))
    if pool is not None:
        pool.stop()
        pool.join()
    loop.close()
    table(f"Past a deadline of {DEADLINE_S * 1e3:g} ms", rows)


def closing(rounds: int) -> None:
    """Time closing with eight live calls."""
    rows = []
    for name, function, isolation in (
        ("coroutines (goal: <= 5 ms)", functions.sleep_async, None),
        ("threads that ask (each ms)", functions.ask, "thread"),
        ("processes", functions.sleep, "process"),
    ):
        times = []
        for _ in range(max(1, rounds // 10)):
            worker = AsyncWorker(8)
            for _ in range(8):
                worker.submit(function, 30.0, timeout_s=60.0, isolation=isolation)
            end = time.monotonic() + 60
            while isolation == "process" and worker.stats().children < 8:
                if time.monotonic() > end:
                    raise SystemExit("the processes did not start")
                time.sleep(0.01)
            time.sleep(0.05)
            report = worker.shutdown()
            times.append(report.seconds)
            if report.left:
                raise SystemExit(f"left after closing: {report.left}")
        rows.append((f"esper, eight {name}", f"{statistics.median(times) * 1e3:.1f} ms", ""))
    table("Closing a worker with live calls", rows)


def many_timeouts(worker: AsyncWorker, count: int) -> None:
    """Count what a great many missed deadlines leave behind."""
    process = psutil.Process()

    def batch() -> None:
        handles = [worker.submit(functions.sleep_async, 9.0, timeout_s=0.001) for _ in range(8)]
        for handle in handles:
            with suppress(DeadlineExceeded):
                handle.result()

    for _ in range(200):
        batch()
    threads, memory = process.num_threads(), process.memory_info().rss
    for _ in range(count // 8):
        batch()
    rows = [
        ("threads more", f"{process.num_threads() - threads}", "goal: 0"),
        ("slots still taken", f"{len(worker.stats().live)}", "goal: 0"),
        ("memory more", f"{(process.memory_info().rss - memory) / 2**20:.1f} MiB", "goal: < 5"),
    ]
    peers = min(count, 500)
    threads = process.num_threads()
    for _ in range(peers):
        executor = ThreadPoolExecutor(1)
        with suppress(FutureTimeoutError):
            executor.submit(time.sleep, 2.0).result(0.001)
        executor.shutdown(wait=False)
    more = process.num_threads() - threads
    rows.append((f"ThreadPoolExecutor for each of {peers}: threads more", f"{more}", ""))
    time.sleep(2.5)
    table(f"After {count:,} missed deadlines of coroutines", rows)


def tensors(worker: AsyncWorker, rounds: int) -> None:
    """Time a tensor of 40 MB to a process and back."""
    tensor = torch.ones(10_000_000)
    arms: dict[str, Arm] = {
        "esper, through shared memory": lambda: worker.call(
            functions.same, tensor, timeout_s=60.0, isolation="process"
        ),
        "copying it twice in one process": lambda: tensor.clone().clone(),
    }
    pool = pebble.ProcessPool(max_workers=1) if pebble is not None else None
    if pool is not None:
        array = tensor.numpy()
        arms["pebble, numpy array"] = lambda: pool.schedule(functions.same, [array]).result()
    found = medians(arms, max(3, rounds // 10))
    if pool is not None:
        pool.stop()
        pool.join()
    table("40 MB there and back", [(n, f"{s * 1e3:.0f} ms", "") for n, s in found.items()])


def training(worker: AsyncWorker, seconds: float) -> None:
    """Measure what calls that hang cost a thread that trains."""
    torch.set_num_threads(1)
    weight, batch = torch.randn(128, 128), torch.randn(64, 128)

    def steps() -> float:
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                torch.relu(batch @ weight).sum()
            done += 1
        return done / seconds

    hanging: dict[str, tuple[Callable[..., object], str | None]] = {
        "nothing else": (functions.nothing, "thread"),
        "a coroutine that awaits for ever": (functions.sleep_async, None),
        "a coroutine that swallows its cancellation": (functions.swallow, None),
        "a thread that sleeps past its deadline": (functions.sleep, "thread"),
        "a process that waits for ever": (functions.sleep, "process"),
    }
    found: dict[str, list[float]] = {name: [] for name in hanging}
    for _ in range(5):
        for name, (function, isolation) in hanging.items():
            arguments = () if name == "nothing else" else (4 * seconds,)
            handle = worker.submit(function, *arguments, timeout_s=0.01, isolation=isolation)
            time.sleep(0.1)
            found[name].append(steps())
            handle.cancel()
            while worker.stats().live:
                time.sleep(0.01)
    base = statistics.median(found["nothing else"])
    rows = []
    for name, rates in found.items():
        rate = statistics.median(rates)
        rows.append((name, f"{rate:.0f} /s", f"{(rate / base - 1) * 100:+.1f} %"))
    table("A training thread while a call hangs", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--timeouts", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    if pebble is None:
        print("pebble is not installed and left out; the bench extra has it")
    # glibc would otherwise give memory back and fetch it again between rounds.
    ctypes.CDLL(None).mallopt(-1, 1 << 30)
    with AsyncWorker(8) as worker:
        round_trips(worker, rounds)
        polls(worker, rounds)
        overruns(worker, max(3, rounds // 10))
        tensors(worker, rounds)
        training(worker, 0.1 if options.quick else 1.0)
        many_timeouts(worker, 200 if options.quick else options.timeouts)
    closing(rounds)


if __name__ == "__main__":
    main()
