import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

JOB = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from esper import TrainingJob

def loss(model, batch):
    output = model(batch[0])
    return {"fit": (output - batch[1]).square().mean(), "size": output.abs().mean()}

def build(samples=320, **changes):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(samples, 4, generator=generator)
    parts = dict(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        data=TensorDataset(data, data.sum(1, keepdim=True)),
        loss=loss, batch_size=16, name="tiny",
    )
    return TrainingJob(**(parts | changes))

def slow():
    import time
    def slowly(model, batch):
        time.sleep(0.01)
        return loss(model, batch)
    return build(loss=slowly)

def empty():
    return build(samples=0)

def vector():
    return build(loss=lambda model, batch: model(batch[0]))

def raises():
    raise ValueError("no data today")

def bad_model():
    return build(model="not a model")

def diverges():
    return build(loss=lambda model, batch: model(batch[0]).sum() * float("nan"))

number = 3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job in it, and nothing of the environment's settings."""
    (tmp_path / "tiny_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("ESPER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


Esper = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def esper(workplace: Path) -> Esper:
    """Run the real command in a process of its own."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "esper", *arguments],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run
