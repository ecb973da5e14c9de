import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "worker.py"
TITLES = (
    "Round trip of a call",
    "Submitting, and looking",
    "Past a deadline",
    "40 MB to a process",
    "A thread that trains",
    "Closing with 8 calls",
    "After so many missed deadlines",
)


def run(*arguments: str, search_path: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(search_path)} if search_path else {})
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_benchmark_of_calls_prints_every_table() -> None:
    printed = run()
    for title in TITLES:
        assert f"**{title}" in printed
    assert "Esper, coroutine" in printed
    assert "x 5.0 ms: " in printed


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_peer_that_is_not_installed_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "pebble.py").write_text("raise ImportError('not here')\n")
    printed = run("submissions", "overruns", search_path=tmp_path)
    assert "pebble is not installed and left out" in printed
    assert "| pebble" not in printed
    assert "submit: pebble" not in printed
    assert "Esper, process that spins, killed" in printed
    assert "**Round trip" not in printed


def test_a_table_that_does_not_exist_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no table nonsense" in done.stderr
