from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper import TolariaTrainer
from esper.core.config import AggregationConfig, TolariaConfig, TrainConfig
from esper.leyline import LossError
from esper.tolaria.aggregation import MODES, Mode, PCGrad, Weighted, losses_by_task
from esper.tolaria.data import plan_data
from esper.tolaria.evaluation import Evaluation
from esper.tolaria.objective import Objective


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 40), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(40, 1), nn.Linear(40, 1)])

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.trunk(inputs)
        return torch.cat([head(features) for head in self.heads], dim=1)


def both(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    output = model(batch[0])
    return {
        "up": (output[:, 0] - batch[1]).square().mean(),
        "down": (output[:, 1] + batch[1]).square().mean(),
    }


def by_sample(model: nn.Module, batch: Any) -> dict[str, Tensor | None]:
    inputs, target, task = batch
    output = model(inputs).gather(1, task.unsqueeze(1)).squeeze(1)
    return losses_by_task((output - target).square(), task, ["up", "down"])


def data(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 4, generator=generator)
    # Long stretches of one task, so that many batches lack the other.
    task = (torch.arange(samples) // 24) % 2
    return TensorDataset(inputs, inputs.sum(1), task)


def test_an_absent_task_is_left_out() -> None:
    model = TwoTasks()
    objective = Objective(model, by_sample, aggregator=Weighted({"up": 1, "down": 2}))
    inputs, target = torch.randn(8, 4), torch.randn(8)
    losses = objective.losses((inputs, target, torch.zeros(8, dtype=torch.long)))
    assert list(losses) == ["up"]
    gradients = objective.backward(losses)
    assert gradients.losses.keys() == {"up"}
    assert not model.heads[1].weight.grad.any()


def test_a_batch_without_any_task_is_refused() -> None:
    objective = Objective(TwoTasks(), lambda model, batch: {"up": None, "down": None})
    with pytest.raises(LossError, match="return one for at least one task"):
        objective.losses(None)


@pytest.mark.parametrize("mode", MODES)
def test_training_takes_the_mode_that_is_set(mode: Mode) -> None:
    def train(mode: Mode) -> list[float]:
        model = TwoTasks()
        trainer = TolariaTrainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.05),
            data(),
            both,
            config=TolariaConfig(
                train=TrainConfig(epochs=4),
                aggregation=AggregationConfig(mode=mode),
            ),
        )
        return [state.losses["up"] + state.losses["down"] for state in trainer.run()]

    losses = train(mode)
    assert losses[-1] < losses[0] / 2
    if mode != "features":
        assert losses == pytest.approx(train("sequential"), rel=1e-4)


def test_a_mixed_loader_trains_both_tasks() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    trainer = TolariaTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        data(256),
        by_sample,
        config=TolariaConfig(train=TrainConfig(epochs=5)),
    )
    losses = [state.losses for state in trainer.run()]
    assert losses[0].keys() == {"up", "down"}
    assert all(losses[-1][task] < losses[0][task] / 2 for task in ("up", "down"))


def test_validation_averages_a_task_over_the_batches_that_have_it() -> None:
    model = TwoTasks()
    plan = plan_data(data(48), batch_size=24, shuffle=False, role="validation")
    evaluation = Evaluation(model, plan, metrics=None, loss=by_sample, place=lambda batch: batch)
    measured = evaluation.run()
    inputs, target, task = data(48).tensors
    with torch.no_grad():
        output = model(inputs).gather(1, task.unsqueeze(1)).squeeze(1)
    squares = (output - target).square()
    assert measured == {
        "up": pytest.approx(float(squares[:24].mean())),
        "down": pytest.approx(float(squares[24:].mean())),
    }


def test_pcgrad_is_what_several_losses_get() -> None:
    assert isinstance(Objective(TwoTasks(), both).aggregator, PCGrad)
