import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.profiler._trace_validator import validate_trace
from typer.testing import CliRunner

from esper.cli.app import app

ESPER = [sys.executable, "-c", "from esper.cli import main; main()"]


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*ESPER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ask(runs: Path, *arguments: str) -> "subprocess.Popen[str]":
    return start("profile", "job", "--runs", str(runs), *arguments)


def output_of(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, " ".join(errors.split())


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    command = [*ESPER, "train", "--epochs", "500", "--no-drill"]
    command += ["--threads", "1", "--runs", str(tmp_path), "--name", "job", "--quiet"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoints = tmp_path / "job" / "checkpoints"
    end = time.monotonic() + 60
    while not list(checkpoints.glob("step-*")) and time.monotonic() < end:
        time.sleep(0.05)
    yield tmp_path
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "USDT" not in errors, "kineto does not write into the terminal"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_running_job_is_profiled_from_another_terminal(job: Path) -> None:
    requests = job / "job" / "profiles" / "requests"
    code, output, errors = output_of(ask(job, "--steps", "5"))
    assert code == 0, errors
    path = Path(output.strip())
    assert path.parent == job / "job" / "profiles"
    assert "5 steps" in errors
    assert "perfetto" in errors
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 5
    assert "aten::mm" in names or "aten::addmm" in names
    assert validate_trace(str(path)) == (True, [])

    # Two at once: one after the other.
    both = [ask(job, "--steps", "2"), ask(job, "--steps", "3")]
    done = [output_of(process) for process in both]
    assert [code for code, _, _ in done] == [0, 0], done
    assert len({output for _, output, _ in done}) == 2

    # One that is interrupted, and one that waits too short a time, leave nothing behind.
    interrupted = ask(job, "--steps", "1000")
    end = time.monotonic() + 30
    while not list(requests.glob("request-*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    interrupted.send_signal(signal.SIGINT)
    assert output_of(interrupted)[0] == 130
    code, _, errors = output_of(ask(job, "--steps", "1000", "--timeout", "0.2"))
    assert code != 0
    assert "has recorded no profile within 0.2 s, and the request is taken back" in errors
    assert list(requests.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; give 1 to 1000"),
        (["--timeout", "0"], "--timeout is 0; give seconds above 0"),
        (["--timeout", "nan"], "--timeout is nan; give seconds above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["profile", "job", *arguments])
    assert done.exit_code != 0
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.timeout(180)
def test_a_run_that_is_not_running_is_told_so(tmp_path: Path) -> None:
    trained = start("train", "--epochs", "1", "--runs", str(tmp_path), "--name", "job", "--quiet")
    assert output_of(trained)[0] == 0
    code, _, errors = output_of(ask(tmp_path))
    assert code != 0
    assert "job is not running; there are no steps to profile" in errors
