import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from esper.cli.run_directory import read_config
from esper.leyline import StepRecord
from esper.nissa import read_records
from esper.nissa.report.comparison import ARMS, Comparison, read_comparison

Esper = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

JOB = """
import os
import signal
import time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from esper import TrainingJob
from esper.kasmina import Kasmina
from esper.leyline import SeedCommand, SeedOperation, Stage

class Plants:
    mode = "wait"
    isolation = "thread"

    def decide(self, state):
        if state.growth.seeds["1"].stage is Stage.DORMANT:
            return SeedCommand("1", SeedOperation.GERMINATE, "mlp")

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def data(seed, samples):
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.prod(1, keepdim=True))

def job(width, **changes):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
    parts = dict(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        data=data(0, 64), loss=loss, validation=data(1, 32), batch_size=16, name="tiny",
    )
    return TrainingJob(**(parts | changes))

def grown(**changes):
    made = job(4, **changes)
    kasmina = Kasmina(made.model, made.optimizer, slots=["1"], sample=made.data[:8][0])
    return TrainingJob(**{**vars(made), "policy": Plants(), "executor": kasmina})

def build():
    return grown()

def build_small():
    return job(4)
"""
LARGE = "def build_large():\n    return job(32)\n"


@pytest.fixture
def folder(workplace: Path) -> Path:
    (workplace / "growing.py").write_text(JOB + LARGE)
    return workplace


def compared(folder: Path, name: str) -> Comparison:
    found = read_comparison(folder / "runs" / name)
    assert found is not None
    return found


def steps_of(run: Path) -> list[StepRecord]:
    return [r for r in read_records(run / "events.jsonl") if isinstance(r, StepRecord)]


def test_three_arms_are_trained_in_pairs_and_compared(
    esper: Esper, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A flag counts more than the environment, also for what is trained afterwards.
    monkeypatch.setenv("ESPER_TRAIN__EPOCHS", "9")
    result = esper(
        "train", "growing:build", "--epochs", "3", "--seed", "5", "--name", "a", "--baselines", "2"
    )
    assert result.returncode == 0, result.stderr
    found = compared(folder, "a")
    assert found.seeds == [5, 6]
    assert found.targets["large"] == "growing:build_large"
    assert sorted((run.arm, run.seed) for run in found.runs) == sorted(
        (arm, seed) for arm in ARMS for seed in (5, 6)
    )
    by_arm = {run.arm: run for run in found.runs}
    assert by_arm["small"].parameters == 25
    assert by_arm["large"].parameters == 193
    assert 25 < (by_arm["grown"].parameters or 0) < 193
    # Forwards, gradients of both layers' weights, and of the second one's input; 12 steps of 16.
    assert by_arm["small"].operations == 12 * 2 * 16 * (2 * 16 + 3 * 4)
    assert (by_arm["grown"].operations or 0) > by_arm["small"].operations
    assert all(run.validation.keys() == {"loss"} and run.seconds for run in found.runs)

    run = folder / "runs" / "a"
    assert [r.losses for r in steps_of(run)] == [
        r.losses for r in steps_of(run / "baselines" / "grown-5")
    ]
    own = read_config(run / "baselines" / "large-6")
    assert (own["train"]["seed"], own["train"]["epochs"], own["run"]["drill"]) == (6, 3, False)
    assert not (run / "baselines" / "large-6" / "checkpoints").exists()

    assert "baseline 6 of 6" in result.stderr
    assert "grown minus large" in result.stderr
    verdict = next(line for line in result.stderr.splitlines() if line.startswith("loss, grown: "))
    page = (run / "report.html").read_text()
    assert "What growth has brought" in page
    assert verdict in page
    (run / "report.html").unlink()
    assert esper("report", "a").returncode == 0
    assert verdict in (run / "report.html").read_text()


def test_trainings_that_fail_are_told_and_the_others_are_compared(
    esper: Esper, folder: Path
) -> None:
    (folder / "growing.py").write_text(
        JOB
        + """
def build_large():
    if torch.initial_seed() == 1:
        raise ValueError("no room for it")
    return job(32)

def build_small():
    def fatal(model, batch):
        if torch.initial_seed() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)
    return job(4, loss=fatal)
"""
    )
    result = esper(
        "train", "growing:build", "--epochs", "2", "--name", "b", "--baselines", "2", "--quiet"
    )
    assert result.returncode == 0, result.stderr
    runs = {(run.arm, run.seed): run for run in compared(folder, "b").runs}
    assert len(runs) == 6
    raised, killed = runs["large", 1], runs["small", 0]
    assert raised.outcome == "failed"
    assert "growing:build_large raised ValueError: no room for it (exit code 2" in raised.error
    assert "ended by signal 9" in killed.error
    assert "large, seed 1 failed" in result.stderr
    assert "one seed does not tell it from large" in result.stderr
    assert "no room for it" in (folder / "runs" / "b" / "report.html").read_text()
    assert "baseline 1 of 6" not in result.stderr


def test_an_arm_of_fixed_size_must_not_grow_and_a_halted_one_is_called_so(
    esper: Esper, folder: Path
) -> None:
    (folder / "growing.py").write_text(
        JOB
        + """
def build_small():
    return grown()

def build_large():
    return job(32, loss=lambda model, batch: loss(model, batch) * float("nan"))
"""
    )
    result = esper("train", "growing:build", "--epochs", "2", "--name", "c", "--baselines", "1")
    assert result.returncode == 0, result.stderr
    runs = {run.arm: run for run in compared(folder, "c").runs}
    assert "has an executor; the small arm is of a fixed size" in runs["small"].error
    assert runs["large"].outcome == "was halted"
    assert "not compared with small; not compared with large" in result.stderr


def test_a_job_that_cannot_be_compared_is_refused_before_it_is_trained(
    esper: Esper, folder: Path
) -> None:
    (folder / "growing.py").write_text(JOB)
    result = esper("train", "growing:build", "--epochs", "1", "--baselines", "1")
    assert result.returncode == 2
    assert "module growing has no build_large; add build_small() and build_large()" in result.stderr
    (folder / "growing.py").write_text(
        JOB + LARGE + "def blind():\n    return grown(validation=None)\n"
    )
    result = esper("train", "growing:blind", "--epochs", "1", "--baselines", "1")
    assert result.returncode == 2
    assert "growing:blind has no validation data" in result.stderr
    assert not (folder / "runs").exists()


SLOW = """
def build_small():
    def slow(model, batch):
        time.sleep(0.1)
        return loss(model, batch)
    return job(4, loss=slow)

build_large = build_small
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_trains_on_when_the_command_has_ended(number: signal.Signals, folder: Path) -> None:
    (folder / "growing.py").write_text(JOB + SLOW)
    command = [
        sys.executable, "-m", "esper", "train", "growing:build", "--epochs", "50", "--name", "d",
        "--baselines", "1", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    children = _training(process.pid, folder / "runs" / "d" / "baselines")
    os.kill(process.pid, number)
    assert process.wait(20) == (130 if number is signal.SIGINT else -number)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert len(gone) == len(children)


def _training(command: int, folder: Path) -> list[psutil.Process]:
    """Wait until a static arm trains; return the trainings' processes."""
    end = time.monotonic() + 40
    while time.monotonic() < end:
        events = folder / "small-0" / "events.jsonl"
        if events.is_file() and events.stat().st_size:
            return psutil.Process(command).children()
        time.sleep(0.05)
    raise TimeoutError("no baseline has begun to train")
