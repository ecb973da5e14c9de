import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app

ESPER = [sys.executable, "-c", "from esper.cli import main; main()"]


def esper(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*ESPER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    runs = tmp_path
    command = [*ESPER, "train", "--epochs", "500", "--no-drill"]
    command += ["--threads", "1", "--runs", str(runs), "--name", "job", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = runs / "job" / "checkpoints"
    end = time.monotonic() + 60
    while not list(checkpoints.glob("step-*")) and time.monotonic() < end:
        time.sleep(0.05)
    yield runs
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def order(runs: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return esper("emergency", "job", "--runs", str(runs), *arguments)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_running_job_acts_on_what_another_terminal_says(job: Path) -> None:
    assert order(job).stdout == "no emergency\n"
    for level in ("minor", "major"):
        done = order(job, "--level", level, "--reason", f"try {level}")
        assert re.match(rf"{level}: acted on after [\d.e+]+ ms\n", done.stdout), done
        assert done.returncode == 0
    assert order(job, "--level", "critical", "--reason", "hold").returncode == 0
    shown = order(job).stdout
    assert shown.startswith("critical since ")
    assert shown.endswith(": hold\n")
    events = job / "job" / "events.jsonl"
    time.sleep(1.0)
    before = events.stat().st_size
    time.sleep(0.5)
    assert events.stat().st_size == before, "it stands still"
    assert "cleared: acted on" in order(job, "--clear").stdout
    end = time.monotonic() + 10
    while events.stat().st_size == before and time.monotonic() < end:
        time.sleep(0.05)
    assert events.stat().st_size > before, "it goes on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "panic"], "known are none, minor, major, severe, critical"),
        (["--level", "minor", "--clear"], "contradict each other"),
        (["--reason", "why"], "needs a --level"),
    ],
)
def test_contradictions_are_refused(arguments: list[str], message: str) -> None:
    # In this process: they are refused before a run is looked for.
    done = CliRunner().invoke(app, ["emergency", "job", *arguments])
    assert done.exit_code != 0
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.timeout(180)
def test_a_run_that_is_not_running_is_told_so(tmp_path: Path) -> None:
    trained = esper("train", "--epochs", "1", "--runs", str(tmp_path), "--name", "job", "--quiet")
    assert trained.returncode == 0, trained.stderr
    done = order(tmp_path, "--level", "minor")
    assert done.returncode != 0
    assert "job is not running" in done.stderr
