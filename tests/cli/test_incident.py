import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.conftest import Esper
from esper.cli.app import app

JOB = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from esper import TrainingJob

class Ratio(nn.Module):
    def forward(self, inputs):
        return inputs / inputs[:, :1]

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def build():
    inputs = torch.rand(256, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs[77, 0] = 0
    model = nn.Sequential(Ratio(), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return TrainingJob(model=model, optimizer=optimizer, data=data, loss=loss, batch_size=16)
"""
TRAIN = ("train", "--threads", "1", "--runs", "runs", "--name", "a", "--quiet")


@pytest.fixture
def trained(esper: Esper, workplace: Path) -> Path:
    """A run of a job with a sample that it divides by zero for."""
    (workplace / "odd_job.py").write_text(JOB)
    done = esper(*TRAIN, "odd_job:build", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    return workplace / "runs" / "a"


@pytest.mark.timeout(120)
def test_a_division_by_zero_is_listed_shown_and_replayed(trained: Path, esper: Esper) -> None:
    listed = esper("incident", "ls", "a").stdout
    names = re.findall(r"^\d{4}-step-\d{6}", listed, re.MULTILINE)
    assert len(names) == 2
    assert "loss nan is not finite" in listed
    assert "run ended" in listed

    shown = esper("incident", "show", "a", names[1]).stdout
    assert "skip: loss nan is not finite" in shown
    assert "kept in batch-" in shown
    assert "float32 (16, 4)" in shown

    replayed = esper("incident", "replay", "a", "2", "--from", "healthy")
    assert replayed.returncode == 0, replayed.stderr
    assert "every loss and gradient norm equal to the bit" in replayed.stdout
    assert "output of 0 is not finite first, in the forward pass: aten.div" in replayed.stdout
    assert "the batch alone causes it" in replayed.stdout


@pytest.mark.timeout(120)
def test_a_replay_elsewhere_says_what_differs(trained: Path, esper: Esper) -> None:
    job = trained.parent.parent / "odd_job.py"
    job.write_text(JOB.replace(".square()", ".abs()"))
    replayed = esper("incident", "replay", "a", "1").stdout
    assert re.search(r"not exact: .*; the loss of step 0 was [\d.]+ and is [\d.]+ \(", replayed)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_built_in_job_with_its_drill(esper: Esper) -> None:
    assert esper(*TRAIN, "--epochs", "1").returncode == 0
    assert " MADs above the median of " in esper("incident", "ls", "a").stdout
    shown = esper("incident", "show", "a", "1").stdout
    head = ["step", "epoch", "batch", "action", "rate", "norm", "loss", "left", "right"]
    assert head in [line.split() for line in shown.splitlines()]
    replayed = esper("incident", "replay", "a", "1", "--from", "healthy")
    assert replayed.returncode == 0, replayed.stderr
    assert "every loss and gradient norm equal to the bit" in replayed.stdout
    assert "output of trunk.0 breaks the trend first" in replayed.stdout
    assert re.search(r"^trunk\.0\.weight +float32 \(3, 1, 3, 3\) ", replayed.stdout, re.MULTILINE)
    assert "the batch itself is out of the ordinary: batch[0]" in replayed.stdout
    assert "the batch alone causes it" in replayed.stdout


def test_a_run_without_incidents_says_so(workplace: Path) -> None:
    run = workplace / "runs" / "calm"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("")
    done = CliRunner().invoke(app, ["incident", "ls", "calm", "--runs", "runs"])
    assert done.exit_code == 0
    assert done.stdout.startswith("no incidents in ")
    done = CliRunner().invoke(app, ["incident", "show", "calm", "1", "--runs", "runs"])
    assert done.exit_code == 2
    assert "calm has no incident '1'; it has none" in done.stderr.replace("\n", " ")


def test_what_was_only_counted_is_told(workplace: Path) -> None:
    folder = workplace / "runs" / "many" / "incidents"
    folder.mkdir(parents=True)
    (folder.parent / "config.toml").write_text("")
    (folder / "not_recorded.json").write_text('{"count":7,"first_step":90,"last_step":400}')
    done = CliRunner().invoke(app, ["incident", "ls", "many", "--runs", "runs"])
    assert "7 more between step 90 and step 400 were not recorded" in done.stdout


def test_another_start_is_refused(workplace: Path) -> None:
    done = CliRunner().invoke(app, ["incident", "replay", "a", "1", "--from", "zero"])
    assert done.exit_code == 2
    assert "--from is 'zero'" in done.stderr
