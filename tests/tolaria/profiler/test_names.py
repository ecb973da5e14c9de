import os
import re
import subprocess
import sys

import pytest

from esper.tolaria.profiler import rank, trace_name

DISTRIBUTED = """
import sys
import torch.distributed as dist
from esper.tolaria.profiler import rank
assert rank() == 5, "the launcher says so"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
assert rank() == 0, "torch knows better"
dist.destroy_process_group()
"""


def test_a_name_tells_run_time_host_rank_process_and_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "3")
    name = trace_name("20261124-101500-digits", 7)
    pattern = r"20261124-101500-digits-\d{8}T\d{6}\.\d{9}Z-.+-r3-p(\d+)-7\.pt\.trace\.json"
    match = re.fullmatch(pattern, name)
    assert match is not None
    assert int(match[1]) == os.getpid()


@pytest.mark.parametrize("run", ["../../etc/passwd", "a b\n", "", "日本", "x" * 500, "*?[a]"])
def test_whatever_a_run_is_called_the_name_stays_one_safe_file_name(run: str) -> None:
    name = trace_name(run, 0)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
    assert len(name) < 250


@pytest.mark.parametrize(("told", "expected"), [("2", 2), ("", 0), ("-1", 0), ("x", 0)])
def test_the_launcher_tells_the_rank(
    told: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", told)
    assert rank() == expected


def test_torch_tells_the_rank_when_it_knows(tmp_path: object) -> None:
    command = [sys.executable, "-c", DISTRIBUTED, f"{tmp_path}/store"]
    subprocess.run(command, check=True, env=os.environ | {"RANK": "5"})
