import pytest
import torch
from torch import nn

from esper.leyline import COMMIT, Action, Verdict
from esper.tolaria.objective import Gradients, Objective
from esper.tolaria.update import Update


def model_with_gradient(scale: float = 1.0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, scale)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def gradients(norm: float | None) -> Gradients:
    return Gradients({"loss": 1.0}, 1.0, norm, None)


def moved(model: nn.Linear, before: torch.Tensor) -> float:
    return float((model.weight.detach() - before).abs().max())


@pytest.mark.parametrize(
    ("verdict", "distance", "steps"),
    [(COMMIT, 1.0, 1), (Verdict(Action.SKIP), 0.0, 1), (Verdict(Action.ROLLBACK), 0.0, 0)],
)
def test_only_a_commit_moves_the_weights(verdict: Verdict, distance: float, steps: int) -> None:
    model, optimizer = model_with_gradient()
    before = model.weight.detach().clone()
    update = Update(optimizer)
    update.carry_out(verdict, gradients(None))
    assert moved(model, before) == pytest.approx(distance)
    assert update.progress.step == steps
    assert model.weight.grad is None


def test_a_large_gradient_is_clipped_to_the_norm_and_a_small_one_left_alone() -> None:
    model, optimizer = model_with_gradient(2.0)
    before = model.weight.detach().clone()
    norm = 2.0 * 10**0.5
    Update(optimizer, clip_norm=1.0).commit(gradients(norm))
    assert moved(model, before) == pytest.approx(2.0 / norm, rel=1e-5)
    model, optimizer = model_with_gradient(0.1)
    before = model.weight.detach().clone()
    Update(optimizer, clip_norm=1.0).commit(gradients(0.1 * 10**0.5))
    assert moved(model, before) == pytest.approx(0.1)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.4, total_steps=100),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_cut_of_the_rate_lasts_under_a_schedule(name: str) -> None:
    rates = []
    for factor in (1.0, 0.5):
        _, optimizer = model_with_gradient()
        update = Update(optimizer, scheduler=SCHEDULERS[name](optimizer))
        for _ in range(5):
            update.commit(gradients(None))
        update.scale_learning_rate(factor)
        for _ in range(5):
            update.commit(gradients(None))
        rates.append(update.learning_rate)
    assert rates[1] == pytest.approx(rates[0] / 2, rel=1e-6)


def test_a_scaler_unscales_clips_and_skips_infinite_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    objective = Objective(
        model, lambda m, x: m(x).square().mean(), scaler=scaler, measure_norm=True
    )
    update = Update(optimizer, scaler=scaler, clip_norm=0.5)
    inputs = torch.ones(3, 4)
    measured = objective.backward(objective.losses(inputs))
    plain = nn.Linear(4, 1)
    plain.load_state_dict(model.state_dict())
    plain(inputs).square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    assert measured.norm == pytest.approx(float(expected.norm()), rel=1e-5)
    before = model.weight.detach().clone()
    update.commit(measured)
    step = 0.1 * 0.5 / float(expected.norm()) * float(expected[:4].abs().max())
    assert moved(model, before) == pytest.approx(step, rel=1e-4)
    before = model.weight.detach().clone()
    update.commit(objective.backward(objective.losses(inputs * float("inf"))))
    assert moved(model, before) == 0.0
    assert scaler.get_scale() == 512.0


def test_a_loss_that_reaches_no_parameter_has_no_gradient() -> None:
    model, free = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    objective = Objective(model, lambda m, x: free.sum())
    assert objective.backward(objective.losses(None)).norm == 0.0


def test_a_passing_cut_climbs_back_and_ends_exactly_where_the_rate_was() -> None:
    _, optimizer = model_with_gradient()
    update = Update(optimizer, scheduler=SCHEDULERS["cosine"](optimizer))
    _, untouched = model_with_gradient()
    plain = Update(untouched, scheduler=SCHEDULERS["cosine"](untouched))
    update.progress.rewarm(0.5, 4)
    shares = []
    for _ in range(6):
        shares.append(update.learning_rate / plain.learning_rate)
        update.commit(gradients(None))
        plain.commit(gradients(None))
    assert shares == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
    assert update.learning_rate == plain.learning_rate


def test_a_passing_cut_is_what_the_optimizer_steps_with_and_is_saved() -> None:
    model, optimizer = model_with_gradient()
    update = Update(optimizer)
    update.progress.rewarm(0.25, 3)
    other = Update(optimizer)
    other.progress.load_state_dict(update.progress.state_dict())
    before = model.weight.detach().clone()
    other.commit(gradients(None))
    assert moved(model, before) == pytest.approx(0.25)
    assert other.learning_rate == pytest.approx(0.5)
    other.skip()
    assert other.learning_rate == pytest.approx(0.5), "a skipped step does not count"


def test_a_schedule_that_jumps_says_so() -> None:
    _, optimizer = model_with_gradient()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step > 2 else 1.0)
    update = Update(optimizer, scheduler=schedule)
    jumps: list[int] = []
    update.on_rate_jump = lambda: jumps.append(update.progress.step)
    for _ in range(6):
        update.commit(gradients(None))
    assert jumps == [2]


def test_a_skipped_step_lets_the_scaler_back_off() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    objective = Objective(model, lambda m, x: m(x).square().mean(), scaler=scaler)
    update = Update(optimizer, scaler=scaler)
    objective.backward(objective.losses(torch.full((3, 4), float("inf"))))
    update.skip()
    assert scaler.get_scale() == 512.0
