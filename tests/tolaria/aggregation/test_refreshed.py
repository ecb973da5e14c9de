import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import (
    Aggregator,
    ConflictReport,
    Mean,
    MicroBatches,
    PCGrad,
    Refreshed,
    Weighted,
    backward,
)
from tolaria.aggregation.models import make

TASKS = ("a", "b", "c", "d")


class Model(nn.Module):
    """Four tasks that disagree; each call takes another batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(3, 2) for task in TASKS})
        self.unused = nn.Linear(2, 2)
        self.all = list(self.parameters())

    def losses(self, batch: int, tasks: Sequence[str] = TASKS) -> dict[str, Tensor]:
        hidden = self.trunk(torch.randn(4, 5, generator=torch.Generator().manual_seed(batch)))
        return {
            task: (self.heads[task](hidden) * (-1) ** index).exp().mean()
            for index, task in enumerate(tasks)
        }

    def step(
        self, aggregator: Aggregator, batch: int, tasks: Sequence[str] = TASKS
    ) -> tuple[ConflictReport, list[Tensor | None]]:
        """Return the report and the gradients of one call."""
        self.zero_grad()
        report = backward(self.losses(batch, tasks), self.all, aggregator)
        return report, [parameter.grad for parameter in self.all]

    def lengths(self, batch: int) -> Tensor:
        """Return the norm of each task's gradient at the trunk's output."""
        hidden = self.trunk(
            torch.randn(4, 5, generator=torch.Generator().manual_seed(batch))
        ).detach()
        hidden.requires_grad_()
        losses = [
            (self.heads[task](hidden) * (-1) ** index).exp().mean()
            for index, task in enumerate(TASKS)
        ]
        rows = [torch.autograd.grad(loss, hidden)[0].double().norm() for loss in losses]
        return torch.stack(rows)

    def by_hand(
        self, batch: int, weights: Tensor, tasks: Sequence[str] = TASKS
    ) -> list[Tensor | None]:
        """Return the weighted sum over the trunk, and each head's own gradient."""
        rows = [
            torch.autograd.grad(loss, self.all, retain_graph=True, allow_unused=True)
            for loss in self.losses(batch, tasks).values()
        ]
        result: list[Tensor | None] = []
        for column in zip(*rows, strict=True):
            if None not in column:
                pairs = zip(weights.tolist(), column, strict=True)
                result.append(torch.stack([weight * g for weight, g in pairs]).sum(0))
            else:
                result.append(next((g for g in column if g is not None), None))
        return result


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_in_between_cosines_are_old_and_lengths_are_new() -> None:
    model, aggregator = Model(), Refreshed(PCGrad(), every=3)
    first, found = model.step(aggregator, 0)
    torch.testing.assert_close(found, model.by_hand(0, first.weights))
    assert (first.weights - 1).abs().max() > 1e-3, "the tasks must disagree for this to say much"
    ratio = first.norms / model.lengths(0)
    for batch in (1, 2):
        report, found = model.step(aggregator, batch)
        torch.testing.assert_close(report.cosine, first.cosine)
        torch.testing.assert_close(report.norms, model.lengths(batch) * ratio)
        assert not torch.equal(report.norms, first.norms)
        torch.testing.assert_close(found, model.by_hand(batch, report.weights))
    again, found = model.step(aggregator, 3)
    torch.testing.assert_close(found, model.by_hand(3, again.weights))
    assert (again.cosine - first.cosine).abs().max() > 1e-3


def test_in_between_the_aggregator_is_asked_about_the_estimate() -> None:
    model = Model()
    aggregator = Refreshed(PCGrad(torch.Generator().manual_seed(2)), every=3)
    plain = PCGrad(torch.Generator().manual_seed(2))
    for batch in range(5):
        report, _ = model.step(aggregator, batch)
        torch.testing.assert_close(report.weights, plain.weights(report.gramian))


def test_a_gradient_that_was_short_does_not_blow_up_the_next_update() -> None:
    weight = nn.Parameter(torch.zeros(2))
    one, other = torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.2])

    def step(aggregator: Aggregator, scale: float) -> ConflictReport:
        features = weight * 3
        losses = {"a": features @ one, "b": features @ other * scale}
        return backward(losses, [weight], aggregator)

    aggregator = Refreshed(PCGrad(), every=2)
    assert step(aggregator, 1e-6).weights[1] > 1e5
    report = step(aggregator, 1.0)
    assert report.age == 1
    torch.testing.assert_close(report.weights, step(PCGrad(), 1.0).weights)


def test_in_between_the_gradient_is_added_to_what_is_there() -> None:
    model, aggregator = Model(), Refreshed(Mean(), every=2)
    report, _ = model.step(aggregator, 0)
    expected = model.by_hand(1, report.weights)
    for parameter in model.all:
        parameter.grad = torch.ones_like(parameter)
    assert backward(model.losses(1), model.all, aggregator).age == 1
    for parameter, gradient in zip(model.all, expected, strict=True):
        wanted = torch.ones_like(parameter) if gradient is None else 1 + gradient
        torch.testing.assert_close(parameter.grad, wanted)


def test_the_report_says_how_old_the_weights_are() -> None:
    model, aggregator = Model(), Refreshed(PCGrad(), every=3)
    ages = []
    for batch in range(7):
        report, _ = model.step(aggregator, batch)
        assert report.age == aggregator.age
        ages.append(report.age)
    assert ages == [0, 1, 2, 0, 1, 2, 0]


def test_another_set_of_tasks_refreshes() -> None:
    model, aggregator = Model(), Refreshed(PCGrad(), every=9)
    sets = ["abcd", "abcd", "abd", "abd", "abcd", "bacd", "bacd"]
    ages = []
    for batch, tasks in enumerate(sets):
        report, found = model.step(aggregator, batch, tasks)
        assert report.tasks == tuple(tasks)
        torch.testing.assert_close(found, model.by_hand(batch, report.weights, tasks))
        ages.append(report.age)
    assert ages == [0, 1, 0, 1, 0, 0, 1]


def test_a_task_that_becomes_absent_refreshes() -> None:
    model, aggregator = (
        Model(),
        Refreshed(Weighted(dict(zip(TASKS, [1, 2, 3, 4], strict=True))), every=9),
    )
    assert model.step(aggregator, 0)[0].weights.tolist() == [0.1, 0.2, 0.3, 0.4]
    report = backward({**model.losses(1), "c": None}, model.all, aggregator)
    assert (report.age, report.absent) == (0, ("c",))
    torch.testing.assert_close(report.weights, torch.tensor([1, 2, 4]).double() / 7)


def test_a_comparison_that_is_not_finite_is_not_kept() -> None:
    model, aggregator = Model(), Refreshed(PCGrad(), every=2)
    model.step(aggregator, 0)
    assert model.step(aggregator, 1)[0].age == 1
    losses = model.losses(2)
    model.zero_grad()
    report = backward({**losses, "b": losses["b"] * math.inf}, model.all, aggregator)
    assert report.age == 0
    assert report.weights.isnan().all()
    weight = model.trunk[0].weight.grad
    assert weight is not None
    assert not weight.isfinite().any()
    # Neither the bad comparison nor the last good one serves.
    report, found = model.step(aggregator, 3)
    assert report.age == 0
    torch.testing.assert_close(found, model.by_hand(3, report.weights))
    assert model.step(aggregator, 4)[0].age == 1


def test_asking_at_every_call_is_the_same_as_the_aggregator_itself() -> None:
    model = Model()
    plain = PCGrad(torch.Generator().manual_seed(5))
    refreshed = Refreshed(PCGrad(torch.Generator().manual_seed(5)), every=1)
    for batch in range(4):
        expected, wanted = model.step(plain, batch)
        report, found = model.step(refreshed, batch)
        assert report.age == 0
        assert torch.equal(report.weights, expected.weights)
        assert torch.equal(report.gramian, expected.gramian)
        assert_equal(found, wanted)


@pytest.mark.parametrize("calls", range(5))
def test_a_saved_state_goes_on_exactly(calls: int) -> None:
    model = Model()
    aggregator = Refreshed(PCGrad(torch.Generator().manual_seed(3)), every=3)
    for batch in range(calls):
        model.step(aggregator, batch)
    saved = aggregator.state_dict()
    other = Refreshed(PCGrad(torch.Generator().manual_seed(4)), every=3)
    model.step(other, 99)
    expected = [model.step(aggregator, batch) for batch in range(calls, calls + 7)]
    # What came after the state was taken must not have changed it.
    other.load_state_dict(saved)
    for batch, (report, gradients) in enumerate(expected, calls):
        found, restored = model.step(other, batch)
        assert found.age == report.age
        assert torch.equal(found.weights, report.weights)
        assert torch.equal(found.gramian, report.gramian)
        assert_equal(restored, gradients)


def test_the_order_of_projections_is_part_of_the_state() -> None:
    gramian = torch.full((4, 4), -0.3, dtype=torch.float64).fill_diagonal_(1)
    gramian += torch.diag(torch.arange(4).double())
    aggregator = Refreshed(PCGrad(torch.Generator().manual_seed(3)), every=2)
    saved = aggregator.state_dict()
    first = aggregator.weights(gramian)
    assert not torch.equal(aggregator.weights(gramian), first)
    aggregator.load_state_dict(saved)
    assert torch.equal(aggregator.weights(gramian), first)


def test_a_fresh_state_makes_it_forget() -> None:
    model, aggregator = Model(), Refreshed(PCGrad(), every=9)
    fresh = aggregator.state_dict()
    model.step(aggregator, 0)
    aggregator.load_state_dict(fresh)
    assert model.step(aggregator, 1)[0].age == 0


def test_an_aggregator_without_a_state_can_be_saved() -> None:
    model, aggregator = Model(), Refreshed(Mean(), every=3)
    model.step(aggregator, 0)
    other = Refreshed(Mean(), every=3)
    other.load_state_dict(aggregator.state_dict())
    assert model.step(other, 1)[0].age == 1
    assert aggregator.age == 0


@pytest.mark.parametrize(("square", "length"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_a_task_without_a_gradient_has_all_compared_at_the_next_call(
    square: float, length: float
) -> None:
    aggregator = Refreshed(PCGrad(), every=9)
    gramian = torch.tensor([[4.0, 0.0], [0.0, square]], dtype=torch.float64)
    aggregator.keep("ab", gramian, torch.tensor([1.0, length], dtype=torch.float64))
    assert aggregator.estimate("ab", torch.ones(2, dtype=torch.float64)) is None


def test_features_have_nothing_to_refresh() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="give it the aggregator itself"):
        backward(model.losses(0), model.all, Refreshed(Mean(), every=2), mode="features")


@pytest.mark.parametrize("every", [0, -1])
def test_less_than_every_call_is_refused(every: int) -> None:
    with pytest.raises(RuntimeError, match=f"every is {every}; give 1 or more"):
        Refreshed(Mean(), every=every)


def test_micro_batches_are_refused() -> None:
    with pytest.raises(RuntimeError, match="refreshed aggregators do without; call"):
        MicroBatches(Model().all, Refreshed(Mean(), every=2))


@pytest.mark.parametrize("option", ["groups", "heads"])
def test_groups_and_heads_are_refused_at_the_first_call(option: str) -> None:
    model = Model()
    options: dict[str, object] = {"groups": {"all": model.all}, "heads": model.all[-2:]}
    with pytest.raises(RuntimeError, match="leave out groups and heads"):
        backward(
            model.losses(0),
            model.all,
            Refreshed(Mean(), every=2),
            **{option: options[option]},  # type: ignore[arg-type]
        )


def test_an_infinity_in_between_is_told() -> None:
    case = make("mlp")
    aggregator = Refreshed(PCGrad(), every=5)
    backward(case.losses(), case.parameters, aggregator)
    losses = case.losses()
    report = backward(
        {**losses, "second": losses["second"] * math.inf}, case.parameters, aggregator
    )
    assert report.age == 1
    assert report.nonfinite == ("second",)
