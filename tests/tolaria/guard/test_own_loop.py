"""Real trainings in a loop of their own: what breaks them without the guard, and not with it."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from esper.core.config import GuardConfig, SnapshotConfig
from esper.leyline import Action, DivergenceError, Verdict
from esper.tolaria import GuardedTraining
from esper.tolaria.data import ResumableLoader, plan_data

STEPS = 240
Spoil = Callable[[int, Tensor], Tensor]


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(32, 8, generator=generator)
    noise = 0.3 * torch.randn(32, 1, generator=generator)
    return inputs, inputs[:, :2].sum(1, keepdim=True).sin() + noise


def error(model: nn.Module) -> float:
    inputs, target = batch(10**6)
    model.eval()
    with torch.no_grad():
        value = functional.mse_loss(model(inputs), target).item()
    model.train()
    return value


def train(guarded: GuardedTraining, model: nn.Module, spoil: Spoil) -> list[Verdict]:
    verdicts = []
    for number in range(STEPS):
        inputs, target = batch(number)
        loss = functional.mse_loss(model(spoil(number, inputs)), target)
        loss.backward()
        verdicts.append(guarded.step(loss))
    return verdicts


def nothing(_: int, inputs: Tensor) -> Tensor:
    return inputs


@pytest.fixture(scope="module")
def healthy_error() -> float:
    model, optimizer = network()
    train(GuardedTraining(model, optimizer), model, nothing)
    return error(model)


def test_a_healthy_training_is_the_one_without_the_guard() -> None:
    model, optimizer = network()
    with GuardedTraining(model, optimizer) as guarded:
        verdicts = train(guarded, model, nothing)
    assert {verdict.action for verdict in verdicts} == {Action.COMMIT}
    plain, plain_optimizer = network()
    for number in range(STEPS):
        inputs, target = batch(number)
        functional.mse_loss(plain(inputs), target).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert (guarded.steps, guarded.skipped, guarded.rollbacks) == (STEPS, 0, 0)


def test_a_bad_batch_is_skipped_and_told_of(
    healthy_error: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = network()
    guarded = GuardedTraining(model, optimizer)
    with caplog.at_level(logging.WARNING, "esper.guard"):
        verdicts = train(guarded, model, lambda n, x: x * math.nan if n == 90 else x)
    assert [n for n, v in enumerate(verdicts) if v.action is Action.SKIP] == [90]
    assert guarded.skipped == 1
    assert "step 90: update skipped (1 so far), loss nan is not finite" in caplog.text
    assert error(model) < 1.2 * healthy_error


def test_weights_that_were_damaged_are_taken_back(healthy_error: float) -> None:
    model, optimizer = network()
    guarded = GuardedTraining(model, optimizer)

    def damage(number: int, inputs: Tensor) -> Tensor:
        if number == 90:
            with torch.no_grad():
                model[3].weight.mul_(-50.0)
        return inputs

    verdicts = train(guarded, model, damage)
    actions = [verdict.action for verdict in verdicts]
    assert actions[90:92] == [Action.SKIP, Action.ROLLBACK]
    assert guarded.rollbacks == 1
    assert guarded.steps < STEPS
    assert error(model) < 1.3 * healthy_error


def test_after_a_rollback_the_rate_climbs_back() -> None:
    model, optimizer = network()
    guarded = GuardedTraining(model, optimizer, config=GuardConfig(rewarm_steps=20))
    rates = []

    def damage(number: int, inputs: Tensor) -> Tensor:
        rates.append(guarded.learning_rate)
        if number == 90:
            with torch.no_grad():
                model[3].weight.mul_(-50.0)
        return inputs

    train(guarded, model, damage)
    assert rates[91:94] == pytest.approx([0.02, 0.01, 0.0105])
    assert rates[-1] == 0.02


def test_a_rate_that_is_too_high_halts_in_the_last_trusted_state() -> None:
    model, optimizer = network()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 if s < 90 else 500.0)
    guarded = GuardedTraining(
        model, optimizer, scheduler=schedule, config=GuardConfig(recovery_steps=10**6)
    )
    with pytest.raises(DivergenceError, match=r"max_rollbacks.*lower the learning rate"):
        train(guarded, model, nothing)
    assert guarded.rollbacks == 3
    assert guarded.steps <= 90
    assert error(model) < 0.5


def test_without_the_guard_the_same_rate_ruins_the_model() -> None:
    model, optimizer = network()
    for number in range(STEPS):
        inputs, target = batch(number)
        functional.mse_loss(model(inputs), target).backward()
        optimizer.param_groups[0]["lr"] = 0.02 if number < 90 else 10.0
        optimizer.step()
        optimizer.zero_grad()
    assert not error(model) < 0.5


def test_components_are_taken_back_and_losses_may_come_by_task() -> None:
    class Counter:
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
            self.value = state_dict["value"]

    model, optimizer = network()
    counter = Counter()
    guarded = GuardedTraining(
        model, optimizer, components={"counter": counter}, snapshots=SnapshotConfig(every=5)
    )
    for number in range(80):
        inputs, target = batch(number)
        if number == 70:
            with torch.no_grad():
                model[3].weight.mul_(-50.0)
        counter.value += 1
        losses = {
            "near": functional.mse_loss(model(inputs), target),
            "small": 1e-3 * model(inputs).square().mean(),
        }
        torch.stack(list(losses.values())).sum().backward()
        guarded.step(losses)
    assert guarded.rollbacks == 1
    assert counter.value < 80
    assert set(guarded.guard.tasks) == {"near", "small"}


def test_random_numbers_go_on_after_a_rollback() -> None:
    model, optimizer = network()
    guarded = GuardedTraining(model, optimizer)
    drawn: list[float] = []

    def damage(number: int, inputs: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        if number == 90:
            with torch.no_grad():
                model[3].weight.mul_(-50.0)
        return inputs

    train(guarded, model, damage)
    assert guarded.rollbacks == 1
    assert len(set(drawn)) == STEPS


def test_gradients_of_a_scaler_are_judged_unscaled() -> None:
    model, optimizer = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guarded = GuardedTraining(model, optimizer, scaler=scaler)
    inputs, target = batch(0)
    loss = functional.mse_loss(model(inputs), target)
    scaler.scale(loss).backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    guarded.step(loss)
    held = guarded.guard.norm.statistics.average
    assert held == pytest.approx(float(norm) / 1024, rel=1e-5)
    loss = functional.mse_loss(model(inputs * math.inf), target)
    scaler.scale(loss).backward()
    assert guarded.step(loss).action is Action.SKIP
    assert scaler.get_scale() == 512.0


def test_a_resumable_loader_is_taken_back_and_leaves_the_batches_out() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1280, 8, generator=generator)
    data = TensorDataset(inputs, inputs[:, :2].sum(1, keepdim=True).sin())
    plan = plan_data(data, batch_size=32, shuffle=True, role="training")
    loader = ResumableLoader(plan, seed=0, epochs=4)
    model, optimizer = network()
    guarded = GuardedTraining(model, optimizer, components={"data": loader})
    seen = []
    for drawn in loader:
        content, target = drawn.content
        bad = (drawn.epoch, drawn.number) in ((2, 10), (2, 11))
        loss = functional.mse_loss(model(content), target + (1e3 if bad else 0.0))
        loss.backward()
        guarded.step(loss, drawn)
        seen.append((drawn.epoch, drawn.number))
    assert guarded.rollbacks == 1
    assert loader.skipped == {(2, 9), (2, 10), (2, 11)}
    assert [seen.count((2, batch)) for batch in (7, 8, 9, 10, 11, 12)] == [2, 2, 1, 1, 1, 1]
    assert set(seen) == {(epoch, batch) for epoch in range(4) for batch in range(40)}


def test_with_a_resumable_loader_the_batch_has_to_be_told() -> None:
    plan = plan_data(TensorDataset(torch.ones(4, 8)), batch_size=2, shuffle=False, role="training")
    model, optimizer = network()
    loader = ResumableLoader(plan, seed=0, epochs=1)
    guarded = GuardedTraining(model, optimizer, components={"data": loader})
    with pytest.raises(TypeError, match="lacks the batch"):
        guarded.step(1.0)
