"""Whatever is submitted, from wherever: each submission ends in exactly one way, and is counted."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from esper.core.worker import AsyncWorker, Outcome, WorkerHandle
from esper.leyline import CallCancelled, DeadlineExceeded, WorkerFull
from support.calls import double, echo, fail, fail_in_a_coroutine, late_by, obey, sleep, until


@dataclass(frozen=True)
class Plan:
    """One submission, and what may come of it."""

    function: Any
    arguments: tuple[Any, ...]
    isolation: Any
    timeout_s: float
    cancel: bool
    wait: bool


CALLS = st.sampled_from(
    [
        (echo, (1,), "async"),
        (sleep, (0.002,), "async"),
        (sleep, (60,), "async"),
        (fail_in_a_coroutine, ("no",), "async"),
        (double, (1,), "thread"),
        (fail, ("no",), "thread"),
        (obey, (60,), "thread"),
        (late_by, (0.01,), "thread"),
    ]
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    function, arguments, isolation = draw(CALLS)
    timeout_s = draw(st.sampled_from([0.0, 0.001, 0.01]))
    return Plan(function, arguments, isolation, timeout_s, draw(st.booleans()), draw(st.booleans()))


def told_by(handle: WorkerHandle[Any]) -> set[Outcome]:
    """What the handle's answer allows its outcome to be."""
    try:
        handle.result()
    except DeadlineExceeded:
        return {Outcome.TIMEOUT, Outcome.ABANDONED}
    except CallCancelled:
        return {Outcome.CANCELLED}
    except ValueError:
        return {Outcome.ERROR}
    return {Outcome.OK}


class Submitter(threading.Thread):
    def __init__(self, worker: AsyncWorker, todo: list[Plan]) -> None:
        super().__init__()
        self.worker = worker
        self.todo = todo
        self.handles: list[WorkerHandle[Any]] = []
        self.refused = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for plan in self.todo:
                self.submit(plan)
        except BaseException as error:  # noqa: BLE001 - asserted on by the test
            self.error = error

    def submit(self, plan: Plan) -> None:
        try:
            handle = self.worker.submit(
                plan.function, *plan.arguments, timeout_s=plan.timeout_s, isolation=plan.isolation
            )
        except WorkerFull:
            self.refused += 1
            return
        self.handles.append(handle)
        if plan.cancel:
            handle.cancel()
        if plan.wait:
            assert handle.outcome in told_by(handle) | {None}


@settings(max_examples=60)
@given(
    todo=st.lists(st.lists(plans(), max_size=12), min_size=1, max_size=4),
    slots=st.integers(1, 6),
    grace_s=st.sampled_from([0.0, 0.001, 0.5]),
    shut_down_early=st.booleans(),
)
def test_counts_add_up_and_slots_come_back(
    todo: list[list[Plan]], slots: int, grace_s: float, shut_down_early: bool
) -> None:
    worker = AsyncWorker(slots, grace_s=grace_s, preload=())
    try:
        submitters = [Submitter(worker, each) for each in todo]
        for submitter in submitters:
            submitter.start()
        for submitter in submitters:
            submitter.join(15)
            assert submitter.error is None
        if shut_down_early:
            worker.shutdown()
        told: Counter[Outcome] = Counter()
        for submitter in submitters:
            told[Outcome.REFUSED] += submitter.refused
            for handle in submitter.handles:
                allowed = told_by(handle)
                assert handle.done()
                assert handle.outcome in allowed
                told[handle.outcome] += 1
        assert worker.stats().outcomes == +told
        assert told.total() == sum(len(each) for each in todo)
        until(lambda: not worker.stats().live)
        assert all(handle.ended for submitter in submitters for handle in submitter.handles)
        if not shut_down_early:
            for _ in range(slots):
                assert worker.call(echo, 1, timeout_s=10) == 1
    finally:
        worker.shutdown()


@settings(max_examples=30)
@given(depths=st.lists(st.integers(0, 6), min_size=1, max_size=4), slots=st.integers(1, 3))
def test_calls_that_wait_for_calls_never_deadlock(depths: list[int], slots: int) -> None:
    with AsyncWorker(slots, preload=()) as worker:

        async def descend(depth: int) -> int:
            if depth == 0:
                return 0
            if depth % 2:
                return 1 + await worker.submit(descend, depth - 1, timeout_s=15)
            return 1 + await worker.submit(climb, depth - 1, timeout_s=15, isolation="thread")

        def climb(depth: int) -> int:
            if depth == 0:
                return 0
            if depth % 3:
                return 1 + worker.call(climb, depth - 1, timeout_s=15, isolation="thread")
            return 1 + worker.call(descend, depth - 1, timeout_s=15)

        began = time.monotonic()
        for depth in depths:
            assert worker.call(descend, depth, timeout_s=15) == depth
            assert worker.call(climb, depth, timeout_s=15, isolation="thread") == depth
        assert time.monotonic() - began < 15
        assert worker.stats().live == ()
