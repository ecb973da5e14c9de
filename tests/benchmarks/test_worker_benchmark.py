import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "worker.py"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_of_calls_prints_every_table() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick"], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for title in (
        "Round trip",
        "A look at a call",
        "Past a deadline",
        "40 MB there and back",
        "A training thread while a call hangs",
        "missed deadlines",
        "Closing a worker",
    ):
        assert title in done.stdout
