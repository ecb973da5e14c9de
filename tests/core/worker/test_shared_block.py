import array
import gc
import os

import pytest

from esper.core.worker import AsyncWorker, allocate_shared
from esper.core.worker.shared_block import find_block
from support.calls import shared_and_own, shared_numbers


def test_what_lies_in_one_block_is_found_and_nothing_else() -> None:
    block, other = allocate_shared(1000), allocate_shared(1000)
    found = find_block([block[10:20], block[500:1000]])
    assert found is not None
    assert found[1:] == (1000, [10, 500])
    assert find_block([block[:5], other[:5]]) is None
    assert find_block([block[:5], memoryview(bytearray(5))]) is None
    assert find_block([block[:5].toreadonly()]) is None
    assert find_block([]) is None


def test_a_block_that_nobody_has_leaves_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    blocks = [allocate_shared(4096) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) > before
    del blocks
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("function", [shared_numbers, shared_and_own])
def test_a_process_hands_its_memory_over(function: object) -> None:
    with AsyncWorker(1) as worker:
        for count in (3, 3_000_000):
            numbers, rest = worker.call(function, count, timeout_s=20)  # type: ignore[arg-type]
            assert array.array("i", bytes(numbers)).tolist() == list(range(count))
            assert rest == "whole"
