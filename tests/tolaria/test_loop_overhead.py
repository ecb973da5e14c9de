"""What a step of the loop may cost over a plain one, in calls: a number, not a time."""

from collections.abc import Callable

import pytest

from loops import esper_loop, plain
from loops.counting import per_step, python_calls
from loops.task import Task, make_task

SHORT, LONG = 80, 120


def calls(arm: Callable[[Task], None]) -> float:
    return python_calls(per_step(lambda steps: arm(make_task(steps)), SHORT, LONG))


@pytest.fixture(scope="module")
def plain_calls() -> float:
    return calls(plain.run)


def test_an_idle_loop_costs_at_most_sixty_calls_a_step(plain_calls: float) -> None:
    assert calls(esper_loop.run_idle) <= plain_calls + 60


def test_a_protected_loop_costs_less_than_accelerate_does(plain_calls: float) -> None:
    # Accelerate's own loop makes 255 calls over the plain one at the least we have counted.
    assert calls(esper_loop.run_protected) <= plain_calls + 255
