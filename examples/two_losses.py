"""Your own model under Esper: `esper train two_losses:build` from this folder."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper import TrainingJob


class Network(nn.Module):
    """A trunk with two heads: one predicts the sum of the inputs, one their largest."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.total = nn.Linear(32, 1)
        self.largest = nn.Linear(32, 1)


def loss(model: Network, batch: list[Tensor]) -> dict[str, Tensor]:
    """Return one loss for each task; Esper combines their gradients."""
    inputs = batch[0]
    features = model.trunk(inputs)
    return {
        "total": (model.total(features)[:, 0] - inputs.sum(1)).square().mean(),
        "largest": (model.largest(features)[:, 0] - inputs.amax(1)).square().mean(),
    }


def build() -> TrainingJob:
    """Return the job: model, optimizer, data, loss."""
    model = Network()
    return TrainingJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        data=TensorDataset(torch.randn(4000, 6)),
        validation=TensorDataset(torch.randn(1000, 6)),
        loss=loss,
        name="two-losses",
    )
