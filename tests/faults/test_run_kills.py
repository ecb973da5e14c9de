"""Whole runs killed at random moments, resumed, and killed again until they come to their end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]
TESTS = Path(__file__).parent.parent
KILLS = int(os.environ.get("ESPER_TEST_KILLS", "40"))


def test_a_run_that_is_killed_again_and_again_ends_in_the_weights_of_one_that_never_was(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "support.killed_runs", str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lives = json.loads(ended.stdout.splitlines()[-1])
    assert lives["kills"] >= KILLS
    assert lives["completed"] >= 1
