import math

import torch
from torch import nn

from esper.core.config import GuardConfig
from esper.tolaria import TolariaTrainer
from esper.tolaria.guard.running import RunningStatistics
from support.jobs import config, two_task_data, two_task_job, two_task_loss


def test_a_forward_pass_is_undone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4))
    running = RunningStatistics(model)
    norm = model[1]
    model[:2](torch.randn(8, 4))
    running.remember()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    model[:2](torch.full((8, 4), math.nan))
    assert not bool(norm.running_mean.isfinite().all())
    running.put_back()
    assert all(torch.equal(before[name], buffer) for name, buffer in norm.named_buffers())


def test_layers_that_joined_are_remembered_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    running = RunningStatistics(model)
    model.append(nn.BatchNorm1d(4))
    running.refresh()
    model(torch.randn(8, 4))
    running.put_back()
    assert model[1].num_batches_tracked == 0


def test_a_batch_that_is_refused_leaves_no_trace_in_a_trained_model() -> None:
    seen = 0

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += model.training
        spoilt = math.nan if seen == 20 else 1.0
        return two_task_loss(model, [batch[0] * spoilt, batch[1]])

    torch.manual_seed(0)
    job = two_task_job(data=two_task_data(), loss=loss)
    trainer = TolariaTrainer.from_job(job, config=config())
    actions = [record.action for record in trainer.steps()]
    assert actions.count("skip") == 1
    assert "rollback" not in actions
    assert all(bool(b.isfinite().all()) for b in job.model.buffers() if b.is_floating_point())
    assert GuardConfig().max_skips > 1
