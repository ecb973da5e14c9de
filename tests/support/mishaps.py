"""Jobs in which something goes wrong at a known place, and running them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.core.config import TolariaConfig
from esper.leyline import DivergenceError
from esper.tolaria import TolariaTrainer, TrainingJob
from esper.tolaria.incident import Incident, incident_directories, read_incident
from support.sinks import Memory

SAMPLES = 256
BAD_SAMPLE = 77


class Ratio(nn.Module):
    """Divides by the first feature."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs[:, :1]


class Logarithm(nn.Module):
    """Takes the logarithm of every feature."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()


class Length(nn.Module):
    """Whose gradient at zero is not finite."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.square().sum(1, keepdim=True).sqrt()


class Net(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 8)
        self.odd = odd
        self.body = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(self.odd(inputs)) + self.scale(inputs).mean(1, keepdim=True)


class Norms(nn.Module):
    """Takes the length of what a layer without bias makes: zero for a sample of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.length = Length()
        self.last = nn.Linear(1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.length(self.first(inputs)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, target = batch
    return (model(inputs) - target).square().mean()


def data(bad: Callable[[Tensor], object] | None = None) -> TensorDataset:
    """Positive features, and a target; ``bad`` may spoil one sample."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.rand(SAMPLES, 8, generator=generator) + 0.5
    target = inputs.mean(1, keepdim=True)
    if bad is not None:
        bad(inputs[BAD_SAMPLE])
    return TensorDataset(inputs, target)


def job(model: nn.Module, dataset: TensorDataset, rate: float = 0.01, **parts: Any) -> TrainingJob:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return TrainingJob(
        **{
            "model": model,
            "optimizer": optimizer,
            "data": dataset,
            "loss": loss,
            "validation": data(),
            "batch_size": 16,
            "name": "mishap",
            **parts,
        }
    )


def net(odd: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = Net(odd)
    model(torch.rand(2, 8) + 0.5)
    return model


def divides_by_zero() -> TrainingJob:
    def spoil(sample: Tensor) -> None:
        sample[0] = 0.0

    return job(net(Ratio()), data(spoil))


def logarithm_of_negative() -> TrainingJob:
    def spoil(sample: Tensor) -> None:
        sample[3] = -1.0

    return job(net(Logarithm()), data(spoil))


def root_of_zero() -> TrainingJob:
    torch.manual_seed(0)
    return job(Norms(), data(lambda sample: sample.zero_()))


def explodes(jump_at: int = 40) -> TrainingJob:
    """Ordinary data, and a rate that becomes far too high all at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    made = job(model, data())
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        made.optimizer, lambda step: 1.0 if step < jump_at else 1e6
    )
    return job(model, data(), optimizer=made.optimizer, scheduler=scheduler)


def poisoned(scale: float = 1e4) -> TrainingJob:
    """One sample that is far too large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    return job(model, data(lambda sample: sample.mul_(scale)))


def settings(**sections: dict[str, Any]) -> TolariaConfig:
    return TolariaConfig.model_validate(
        {
            **sections,
            "train": {"epochs": 3, "device": "cpu", **sections.get("train", {})},
        }
    )


def train(
    built: TrainingJob, directory: Path, config: TolariaConfig | None = None, **parts: Any
) -> Memory:
    """Train to the end, which may be a halt; return what was told."""
    sink = Memory()
    trainer = TolariaTrainer.from_job(
        built, config=config or settings(), directory=directory, sinks=[sink], **parts
    )
    try:
        for _ in trainer.steps():
            pass
    except DivergenceError:
        assert trainer.outcome == "halted"
    return sink


def incidents(directory: Path) -> list[Incident]:
    return [read_incident(path) for path in incident_directories(directory)]
