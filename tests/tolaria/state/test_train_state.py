import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esper.leyline import StateError
from esper.tolaria.rollback import FastRollbackCache
from esper.tolaria.state import TrainState
from support.jobs import TwoTasks, two_task_data, two_task_loss

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
}

SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
}


class Trainee:
    def __init__(self, optimizer: str = "adam", scheduler: str = "cosine") -> None:
        torch.manual_seed(0)
        self.model = TwoTasks()
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.state = TrainState(self.model, self.optimizer, {"scheduler": self.scheduler})
        self.data = two_task_data().tensors

    def train(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            index = torch.randint(256, (16,))
            index[0] = random.randrange(256)
            index[1] = int(np.random.randint(256))
            losses = two_task_loss(self.model, [tensor[index] for tensor in self.data])
            self.optimizer.zero_grad()
            sum(losses.values()).backward()  # type: ignore[union-attr]
            self.optimizer.step()
            self.scheduler.step()
        return [tensor.clone() for tensor in self.model.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_from_a_snapshot_repeats_to_the_bit_twice(optimizer: str) -> None:
    trainee = Trainee(optimizer)
    trainee.train(3)
    cache = FastRollbackCache(16)
    snapshot = cache.put(3, trainee.state)
    assert snapshot is not None
    expected = trainee.train(5)
    for _ in range(2):
        cache.restore(snapshot, trainee.state)
        assert same(trainee.train(5), expected)


class Embedded(nn.Module):
    """A model whose parameters all suit one of the more particular optimizers."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4, sparse=sparse)
        self.out = None if sparse else nn.Linear(4, 3, bias=False)

    def loss(self) -> torch.Tensor:
        found = self.table(torch.randint(16, (8,)))
        return ((found if self.out is None else self.out(found)) - 1).square().mean()


@pytest.mark.parametrize(
    ("optimizer", "sparse"),
    [
        (lambda p: torch.optim.SparseAdam(p, lr=0.05), True),
        (lambda p: torch.optim.Muon(p, lr=0.01), False),
        (lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4), False),
    ],
    ids=["sparse-adam", "muon", "lbfgs"],
)
def test_optimizers_with_a_layout_of_their_own_repeat_to_the_bit_twice(
    optimizer: Any, sparse: bool
) -> None:
    torch.manual_seed(0)
    model = Embedded(sparse=sparse)
    made = optimizer(list(model.parameters()))
    state = TrainState(model, made)

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    def train(steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            made.step(closure)
        return [parameter.detach().clone() for parameter in model.parameters()]

    train(3)
    cache = FastRollbackCache(16)
    snapshot = cache.put(3, state)
    assert snapshot is not None
    expected = train(5)
    for _ in range(2):
        cache.restore(snapshot, state)
        assert same(train(5), expected)


def test_mixed_precision_with_a_scaler_repeats_to_the_bit_twice() -> None:
    torch.manual_seed(0)
    model = TwoTasks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=50)
    state = TrainState(model, optimizer, {"scaler": scaler})
    data = two_task_data().tensors
    scales = []

    def train(steps: int) -> list[torch.Tensor]:
        for step in range(steps):
            index = torch.randint(256, (16,))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = two_task_loss(model, [tensor[index] for tensor in data])
            optimizer.zero_grad()
            total = sum(losses.values()) * (float("inf") if step == 4 else 1.0)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        return [tensor.clone() for tensor in model.state_dict().values()]

    train(4)
    cache = FastRollbackCache(16)
    snapshot = cache.put(4, state)
    assert snapshot is not None
    expected = train(7)
    for _ in range(2):
        cache.restore(snapshot, state)
        assert scaler.get_scale() == scales[0]
        assert same(train(7), expected)
    assert scales[1] == scales[2] == scales[3] != scales[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_schedule_is_restored(scheduler: str) -> None:
    trainee = Trainee("sgd", scheduler)
    trainee.train(2)
    cache = FastRollbackCache(16)
    snapshot = cache.put(2, trainee.state)
    assert snapshot is not None
    expected = trainee.train(6)
    rates = [group["lr"] for group in trainee.optimizer.param_groups]
    cache.restore(snapshot, trainee.state)
    assert same(trainee.train(6), expected)
    assert [group["lr"] for group in trainee.optimizer.param_groups] == rates


def test_a_snapshot_from_before_the_optimizer_has_state_is_restored() -> None:
    trainee = Trainee("adam")
    cache = FastRollbackCache(16)
    snapshot = cache.put(0, trainee.state)
    assert snapshot is not None
    expected = trainee.train(4)
    cache.restore(snapshot, trainee.state)
    assert not trainee.optimizer.state
    assert same(trainee.train(4), expected)


def test_a_fresh_process_continues_from_a_capture() -> None:
    trainee = Trainee("adam")
    trainee.train(3)
    cache = FastRollbackCache(16)
    snapshot = cache.put(3, trainee.state)
    assert snapshot is not None
    expected = trainee.train(4)
    other = Trainee("adam")
    cache.restore(snapshot, other.state)
    assert same(other.train(4), expected)


def test_restoring_keeps_the_identity_of_parameters_and_moments() -> None:
    trainee = Trainee("adam")
    trainee.train(1)
    pointers = [p.data_ptr() for p in trainee.model.parameters()]
    moments = [s["exp_avg"].data_ptr() for s in trainee.optimizer.state.values()]
    cache = FastRollbackCache(16)
    snapshot = cache.put(1, trainee.state)
    assert snapshot is not None
    trainee.train(2)
    cache.restore(snapshot, trainee.state)
    assert [p.data_ptr() for p in trainee.model.parameters()] == pointers
    assert [s["exp_avg"].data_ptr() for s in trainee.optimizer.state.values()] == moments


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.count = state_dict["count"]


def test_a_component_can_be_kept_as_it_is() -> None:
    trainee, taken, kept = Trainee(), Counter(), Counter()
    trainee.state.add("taken", taken)
    trainee.state.add("kept", kept)
    cache = FastRollbackCache(16)
    snapshot = cache.put(0, trainee.state)
    assert snapshot is not None
    taken.count = kept.count = 7
    cache.restore(snapshot, trainee.state, keep={"kept"})
    assert (taken.count, kept.count) == (0, 7)
    with pytest.raises(StateError, match="'kept' already"):
        trainee.state.add("kept", kept)


def test_a_state_of_another_model_is_refused_and_nothing_is_touched() -> None:
    trainee = Trainee("sgd")
    trainee.train(1)
    before = [tensor.clone() for tensor in trainee.model.state_dict().values()]
    other = nn.Linear(8, 1)
    foreign = TrainState(other, torch.optim.SGD(other.parameters(), lr=0.1)).capture()
    with pytest.raises(StateError, match="lacks model/trunk"):
        trainee.state.restore(foreign)
    wider = TwoTasks()
    wider.first = nn.Linear(16, 3)
    optimizer = torch.optim.SGD(wider.parameters(), lr=0.1)
    with pytest.raises(StateError, match=r"first\.weight is \(1, 16\)"):
        trainee.state.restore(TrainState(wider, optimizer).capture())
    assert same(before, list(trainee.model.state_dict().values()))


def test_another_grouping_of_parameters_is_refused() -> None:
    trainee = Trainee("sgd")
    parameters = list(trainee.model.parameters())
    other = torch.optim.SGD(
        [{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1, momentum=0.9
    )
    capture = TrainState(trainee.model, other).capture()
    capture.values["components"]["scheduler"] = {}
    with pytest.raises(StateError, match="parameter groups"):
        trainee.state.restore(capture)


def test_a_missing_component_is_named() -> None:
    trainee = Trainee("sgd")
    bare = TrainState(trainee.model, trainee.optimizer).capture()
    with pytest.raises(StateError, match="'scheduler'"):
        trainee.state.restore(bare)
