import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from esper.leyline import Event, StepRecord
from esper.nissa import read_records

Esper = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]


def steps_of(run: Path) -> list[StepRecord]:
    return [r for r in read_records(run / "events.jsonl") if isinstance(r, StepRecord)]


def test_a_run_leaves_its_directory_and_tells_where(esper: Esper, workplace: Path) -> None:
    result = esper("train", "tiny_job:build", "--epochs", "2", "--name", "first")
    assert result.returncode == 0, result.stderr
    run = workplace / "runs" / "first"
    assert {path.name for path in run.iterdir()} == {
        "config.toml", "events.jsonl", "emergency.word", "rollback.deadline", "checkpoints",
        "report.html",
    }  # fmt: skip
    assert "report  runs/first/report.html" in result.stderr.replace("\n", " ")
    assert len(steps_of(run)) == 40
    assert 'target = "tiny_job:build"' in (run / "config.toml").read_text()


def test_a_second_run_of_the_same_name_gets_its_own_directory(
    esper: Esper, workplace: Path
) -> None:
    for _ in range(2):
        assert esper("train", "tiny_job:build", "--epochs", "1", "--name", "x").returncode == 0
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["x", "x-2"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tiny_job", "write it as module:function"),
        ("tiny_jbo:build", "names module 'tiny_jbo'"),
        ("tiny_job:biuld", "did you mean tiny_job:build"),
        ("tiny_job:number", "is a int; name a function"),
        ("tiny_job:raises", "raised ValueError: no data today"),
        ("tiny_job:bad_model", "model is a str"),
        ("tiny_job:loss", "raised TypeError"),
        ("json:JSONEncoder", "returned a JSONEncoder"),
        ("tiny_job:empty", "training data has 0 samples"),
        ("tiny_job:vector", r"loss of task 'loss' has shape (16, 1)"),
    ],
)
def test_what_is_wrong_with_a_job_is_one_line_and_exit_code_2(
    esper: Esper, target: str, message: str
) -> None:
    result = esper("train", target, "--epochs", "1", "--quiet")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(esper: Esper) -> None:
    result = esper("train", "tiny_job:raises", "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "no data today" in result.stderr


def test_a_broken_import_names_what_is_missing(esper: Esper, workplace: Path) -> None:
    (workplace / "needy.py").write_text("import not_there\n")
    (workplace / "broken.py").write_text("1 / 0\n")
    assert "needs module 'not_there'" in esper("train", "needy:build").stderr
    assert "raised ZeroDivisionError" in esper("train", "broken:build").stderr


def test_a_halted_run_has_its_own_exit_code_and_a_report(esper: Esper, workplace: Path) -> None:
    result = esper("train", "tiny_job:diverges", "--name", "nan", "--quiet")
    assert result.returncode == 3
    assert "training was halted" in result.stderr
    assert (workplace / "runs" / "nan" / "report.html").exists()


def test_ctrl_c_saves_and_resume_continues_to_the_bit(esper: Esper, workplace: Path) -> None:
    assert esper("train", "tiny_job:slow", "--epochs", "4", "--name", "whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", "train", "tiny_job:slow", "--epochs", "4", "--name", "cut"],
        stderr=subprocess.PIPE, text=True, cwd=workplace,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch   1"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert "SIGINT: finishing this step" in rest
    assert "resume  esper train --resume runs/cut" in rest
    cut = workplace / "runs" / "cut"
    stopped_at = len(steps_of(cut))
    assert 20 <= stopped_at < 80
    result = esper("train", "--resume", "runs/cut")
    assert result.returncode == 0, result.stderr
    whole = workplace / "runs" / "whole"
    resumed = {r.step: r.losses for r in steps_of(cut)}
    assert resumed == {r.step: r.losses for r in steps_of(whole)}
    assert [r.step for r in steps_of(cut) if r.attempt == 1] == list(range(stopped_at, 80))
    weights = [
        load_file(run / "checkpoints" / "step-000000080" / "tensors.safetensors")
        for run in (whole, cut)
    ]
    assert all(
        (weights[0][name] == weights[1][name]).all()
        for name in weights[0]
        if name.startswith(("model/", "optimizer/"))
    )


@pytest.mark.fault
def test_a_killed_run_continues_to_the_bit(esper: Esper, workplace: Path) -> None:
    every = ("--set", "checkpoints.every=7", "--epochs", "3")
    assert esper("train", "tiny_job:slow", *every, "--name", "whole").returncode == 0
    command = [sys.executable, "-m", "esper", "train", "tiny_job:slow", *every, "--name", "cut"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=workplace)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch   1"):
            process.kill()
            break
    process.stderr.close()
    process.wait()
    result = esper("runs")
    assert "interrupted" in result.stdout
    assert esper("train", "--resume", "cut").returncode == 0
    runs = [workplace / "runs" / name for name in ("whole", "cut")]
    losses = [{r.step: r.losses for r in steps_of(run)} for run in runs]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_for_longer(esper: Esper, workplace: Path) -> None:
    assert esper("train", "tiny_job:build", "--epochs", "2", "--name", "a").returncode == 0
    assert esper("train", "--resume", "a", "--epochs", "3").returncode == 0
    assert len(steps_of(workplace / "runs" / "a")) == 60
    events = [
        r.name
        for r in read_records(workplace / "runs" / "a" / "events.jsonl")
        if isinstance(r, Event)
    ]
    assert events.count("run_ended") == 2
    assert "run_resumed" in events


def test_what_a_resume_cannot_change_is_refused(esper: Esper) -> None:
    esper("train", "tiny_job:build", "--epochs", "1", "--name", "alpha")
    result = esper("train", "--resume", "alpha", "--seed", "3", "--set", "guard.window=9")
    assert result.returncode == 2
    assert "leave out --seed, --set guard.window=9" in result.stderr
    result = esper("train", "--resume", "alhpa")
    assert result.returncode == 2
    assert "did you mean alpha?" in result.stderr


def test_the_module_of_the_engine_trains_too(workplace: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "esper.tolaria", "tiny_job:build", "--epochs", "1", "--quiet"],
        capture_output=True, text=True, check=False, cwd=workplace, env=dict(os.environ),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "report.html" in result.stderr
