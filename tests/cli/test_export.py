import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.conftest import Esper
from esper.cli.export import sample_of_job
from esper.leyline import JobError
from esper.tolaria import TrainingJob

TRAIN = ("train", "--threads", "1", "--runs", "runs", "--name", "a", "--quiet", "--no-drill")
SAVE = ("checkpoint", "export", "a", "--runs", "runs", "--safetensors")
COMMAND = """
import sys
from pathlib import Path
from esper.cli.errors import guarded
from esper.cli.export import export_run
sys.exit(guarded(lambda: export_run({arguments}), debug=False))
"""
Export = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def export(workplace: Path) -> Export:
    def run(arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", COMMAND.format(arguments=arguments)],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    return run


@pytest.mark.timeout(120)
def test_the_model_of_a_run_is_exported(esper: Esper, export: Export, workplace: Path) -> None:
    assert esper(*TRAIN, "tiny_job:build", "--epochs", "2").returncode == 0
    done = export("'a', Path('runs'), None, ['safetensors', 'torch']")
    assert done.returncode == 0, done.stderr
    assert "the model of step 40 in " in done.stdout
    assert "it needs torch and safetensors" in done.stdout
    folder = workplace / "runs" / "a" / "export"
    described = json.loads((folder / "architecture.json").read_text())
    assert described["metadata"]["step"] == 40
    assert described["inputs"] == {"input": {"shape": ["batch", 4], "dtype": "float32"}}
    weights = workplace / "weights.safetensors"
    assert esper(*SAVE, str(weights)).returncode == 0
    exported, saved = load_file(folder / "model.safetensors"), load_file(weights)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)

    refused = export("'a', Path('runs'), None, ['torch']")
    assert refused.returncode == 2
    assert "is not empty" in refused.stderr
    job = workplace / "tiny_job.py"
    job.write_text(job.read_text().replace("nn.Linear(4, 8)", "nn.Linear(4, 8, bias=False)"))
    other = export("'a', Path('runs'), Path('out'), None, overwrite=True")
    assert "does not fit its job" in other.stderr
    nothing = export("'a', Path('runs'), Path('out'), None, step=7")
    assert "no valid checkpoint of step 7 or earlier" in nothing.stderr
    assert not (workplace / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_built_in_job_which_grows(esper: Esper, export: Export, workplace: Path) -> None:
    assert esper(*TRAIN, "--epochs", "2").returncode == 0
    done = export("'a', Path('runs'), Path('out'), ['safetensors']")
    assert done.returncode == 0, done.stderr
    described = json.loads((workplace / "out" / "architecture.json").read_text())
    assert described["outputs"]["left"] == {"shape": ["batch", 10], "dtype": "float32"}
    assert not [module for module in described["modules"] if "esper_slot" in module["path"]]


def make_job(loss: Callable[..., torch.Tensor]) -> TrainingJob:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    data = torch.utils.data.TensorDataset(torch.arange(30.0).view(10, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainingJob(model=model, optimizer=optimizer, data=data, loss=loss, batch_size=4)


def test_the_sample_is_what_the_loss_calls_the_model_with() -> None:
    job = make_job(lambda model, batch: model(input=batch[0] * 2).sum())
    sample = sample_of_job(job)
    assert sample.args == ()
    assert torch.equal(sample.kwargs["input"], 2 * torch.arange(12.0).view(4, 3))
    assert job.model.training
    assert not job.model._forward_pre_hooks


def test_a_loss_that_does_not_call_the_model_is_refused() -> None:
    job = make_job(lambda model, batch: model[0](batch[0]).sum())
    with pytest.raises(JobError, match="does not call its model"):
        sample_of_job(job)
