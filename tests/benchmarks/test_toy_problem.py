from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toy.problem import LEAST_MEAN, Array, gradients, losses, pareto_distance, pareto_x2
from toy.rules import RULES, combine, descend
from toy_problem import STARTS, Outcome, checks, torch_losses

coordinates = st.floats(-11, 11)
jacobians = st.lists(st.floats(-10, 10), min_size=4, max_size=4).map(
    lambda values: np.array(values).reshape(2, 2)
)


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_those_of_autograd(seed: int) -> None:
    points = np.random.default_rng(seed).uniform(-11, 11, (2, 50))
    for index in range(50):
        x = torch.tensor(points[:, index], requires_grad=True)
        for task, value in enumerate(torch_losses(x).values()):
            (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
            np.testing.assert_allclose(losses(points)[task, index], value.item(), rtol=1e-12)
            np.testing.assert_allclose(
                gradients(points)[task, :, index], gradient.numpy(), rtol=1e-8, atol=1e-12
            )


def test_the_corner_between_valleys_and_bowls_has_torchs_derivative() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in _values(x)]
    np.testing.assert_allclose(gradients(np.zeros(2)), torch.stack(rows).numpy(), atol=1e-12)


def test_every_check_of_the_benchmark_holds() -> None:
    found = list(checks())
    assert len(found) >= 4
    assert [name for name, difference, limit in found if not difference <= limit] == []


def test_the_pareto_set_has_opposite_gradients() -> None:
    x1 = np.linspace(-6.9, 6.9, 25)
    points = np.stack([x1, pareto_x2(x1)])
    first, second = gradients(points)
    cosine = (
        (first * second).sum(0) / np.linalg.norm(first, axis=0) / np.linalg.norm(second, axis=0)
    )
    np.testing.assert_allclose(cosine, -1, atol=1e-9)
    assert pareto_distance(points).max() < 1e-12


def test_the_mean_loss_is_least_at_its_point() -> None:
    grid = np.stack(np.meshgrid(np.linspace(-2, 2, 41), np.linspace(-10, -6, 401)))
    least = losses(grid).mean(0)
    row, column = np.unravel_index(least.argmin(), least.shape)
    np.testing.assert_allclose(grid[:, row, column], LEAST_MEAN, atol=0.01)


@given(jacobians)
def test_mgda_finds_the_shortest_mixture(jacobian: Array) -> None:
    shares = np.linspace(0, 1, 101)
    mixtures = shares * jacobian[0][:, None] + (1 - shares) * jacobian[1][:, None]
    shortest = np.linalg.norm(combine(RULES["MGDA"], jacobian))
    assert shortest <= np.linalg.norm(mixtures, axis=0).min() + 1e-6


@given(jacobians)
def test_cagrad_stays_in_its_ball_and_serves_the_worst_task_best(jacobian: Array) -> None:
    mean = jacobian.mean(0)
    radius = 0.4 * np.linalg.norm(mean)
    update = combine(RULES["CAGrad"], jacobian)
    assert np.linalg.norm(update - mean) <= radius * (1 + 1e-6) + 1e-6
    angles = np.linspace(0, 2 * np.pi, 721)
    others = mean[:, None] + radius * np.stack([np.cos(angles), np.sin(angles)])
    best = (jacobian @ others).min(0).max()
    assert (jacobian @ update).min() >= best - 1e-4 * (1 + np.abs(jacobian).max() ** 2)


@given(jacobians)
def test_upgrad_never_harms_a_task(jacobian: Array) -> None:
    assert (jacobian @ combine(RULES["UPGrad"], jacobian)).min() >= -1e-9


def test_a_start_that_reached_the_pareto_set_is_told_from_one_in_a_valley() -> None:
    outcome = Outcome(np.array([[3.0, pareto_x2(np.array([3.0]))[0]], [-5.0, 2.0], [0.0, -3.0]]))
    assert [outcome.place(start) for start in range(3)] == ["Pareto set", "valley", "on the way"]


def test_runs_do_not_depend_on_what_runs_beside_them() -> None:
    rules: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = dict(RULES)
    together = descend(rules, STARTS, 40)
    alone = descend({"MGDA": RULES["MGDA"]}, STARTS[1:2], 40)
    index = list(RULES).index("MGDA")
    np.testing.assert_allclose(together[:, :, index, 1], alone[:, :, 0, 0], rtol=1e-12)


def _values(x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch_losses(x).values())
