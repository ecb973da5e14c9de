import pytest
import torch

import aggregation
import approximate_modes
from combining import measures, peers, steps
from combining.networks import TRUNKS, MultiTask

REFERENCE = "Esper, sequential"
# They leave heads out of the projection, as Esper does, so that all have to move the trunk alike;
# for two tasks PCGrad knows no order.
ALIKE = [
    *steps.EXACT,
    steps.REFRESHED,
    "torchjd, mtl_backward",
    "torchjd, mtl_backward, Gramian",
    "torchjd, mtl_backward, Gramian, chunks of 1",
    "torchjd, autogram",
]


def trunk_after(name: str, kind: str) -> list[torch.Tensor]:
    net = MultiTask(kind, 2)
    steps.ARMS[name](net)()
    return [parameter.detach() for parameter in net.trunk.parameters()]


@pytest.mark.parametrize("kind", list(TRUNKS))
@pytest.mark.parametrize("name", ALIKE)
def test_every_exact_way_takes_the_same_step(name: str, kind: str) -> None:
    torch.testing.assert_close(
        trunk_after(name, kind), trunk_after(REFERENCE, kind), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", [name for name in steps.ARMS if name not in ALIKE])
def test_every_other_arm_takes_a_step(name: str) -> None:
    before = [parameter.detach().clone() for parameter in MultiTask("MLP", 2).trunk.parameters()]
    after = trunk_after(name, "MLP")
    assert all(parameter.isfinite().all() for parameter in after)
    assert not torch.equal(before[0], after[0])


def test_what_is_timed_is_the_papers_algorithm() -> None:
    aggregation.check()


def test_peers_agree_where_order_does_not_matter() -> None:
    gradients = aggregation.make_gradients(2, 3000)
    expected = peers.textbook(gradients, [[0, 1], [0, 1]])
    for found in (peers.libmtl(gradients), [2 * g for g in peers.optimizer_wrapper(gradients)]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_medians_and_peaks_are_measured() -> None:
    times = measures.medians({"a": lambda: None, "b": lambda: sum(range(20_000))}, seconds=0.01)
    assert times["a"] < times["b"]
    peak = measures.peak_megabytes(lambda: torch.ones(8_000_000).sum())
    assert peak is None or 20 < peak < 60


def test_the_eight_tasks_have_labels_within_their_classes() -> None:
    left, right = torch.arange(10).repeat_interleave(10), torch.arange(10).repeat(10)
    labels = approximate_modes.labels_of(left, right)
    for label, (task, classes) in zip(labels, approximate_modes.CLASSES.items(), strict=True):
        assert 0 <= label.min() <= label.max() == classes - 1, task
    assert labels[-1].sum() == 25


def test_the_exact_arms_note_the_errors_of_the_others() -> None:
    torch.manual_seed(0)
    count = 64 * 12
    left, right = torch.randint(0, 10, (count,)), torch.randint(0, 10, (count,))
    data = (torch.randn(count, 1, 12, 12), *approximate_modes.labels_of(left, right))
    arm = approximate_modes.arms()["PCGrad, exact"]
    model, run = approximate_modes.train(arm, seed=0, epochs=1, data=data)
    assert {way: len(errors) for way, errors in run.errors.items()} == {
        approximate_modes.FEATURES: 2,
        approximate_modes.REFRESHED: 1,
        approximate_modes.KEPT: 1,
    }
    assert 0 <= approximate_modes.accuracy(model, data) <= 100
