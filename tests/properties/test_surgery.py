"""What holds for any sequence of operations on an optimizer, of any kind."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.kasmina.surgery import OptimizerSurgeon, Undo
from esper.leyline import GrowthError
from kasmina.surgery.builders import (
    ELEMENTWISE,
    OPTIMIZERS,
    SCHEDULES,
    advance,
    all_facts,
    parameter,
    step,
    two_groups,
)

GROWING = [name for name in OPTIMIZERS if name != "LBFGS"]
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Patient:
    """An optimizer that operations drawn at random are carried out on."""

    def __init__(self, optimizer: Optimizer, surgeon: OptimizerSurgeon, draw: Draw) -> None:
        self.optimizer = optimizer
        self.surgeon = surgeon
        self.born = 0
        self._draw = draw

    @property
    def names(self) -> list[str]:
        return [group["name"] for group in self.optimizer.param_groups if "name" in group]

    def operate(self) -> Undo:
        kinds: list[Callable[[], Undo]] = [self.add, self.replace]
        if self.names:
            kinds += [self.remove, self.merge, self.move]
        return self._draw(st.sampled_from(kinds))()

    def add(self) -> Undo:
        self.born += 1
        sizes = self._draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        return self.surgeon.add_group(
            f"seed {self.born}",
            [parameter(size, 2, seed=self.born) for size in sizes],
            warmup_steps=self._draw(st.integers(0, 3)),
        )

    def remove(self) -> Undo:
        return self.surgeon.remove_group(self._draw(st.sampled_from(self.names)))

    def merge(self) -> Undo:
        name = self._draw(st.sampled_from(self.names))
        return self.surgeon.merge_group(name, self._other(name))

    def move(self) -> Undo:
        name = self._draw(st.sampled_from(self.names))
        (group,) = (g for g in self.optimizer.param_groups if g.get("name") == name)
        return self.surgeon.move_parameters(group["params"][1:], self._other(name))

    def replace(self) -> Undo:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        chosen = self._draw(st.lists(st.integers(0, len(held) - 1), min_size=1, unique=True))
        grown = self._draw(st.integers(0, 2))
        pairs = [(old := held[i], wider(old, grown)) for i in chosen]
        return self.surgeon.replace_parameters(pairs, carry=self._draw(st.booleans()))

    def _other(self, name: str) -> str | None:
        others = [None, *(other for other in self.names if other != name)]
        return self._draw(st.sampled_from(others))  # type: ignore[no-any-return]


def wider(old: Tensor, by: int) -> nn.Parameter:
    new = parameter(*(size + by for size in old.shape), seed=9)
    with torch.no_grad():
        new[tuple(slice(size) for size in old.shape)] = old
    return new


def carry_out(patient: Patient, operations: int) -> list[Undo]:
    """Carry out operations; those that are refused must have touched nothing."""
    undos = []
    for _ in range(operations):
        before = all_facts(patient.optimizer)
        try:
            undos.append(patient.operate())
        except GrowthError:
            assert all_facts(patient.optimizer) == before
    return undos


def take_back(undos: Iterable[Undo]) -> None:
    for undo in undos:
        undo.undo()


@given(data=st.data(), name=st.sampled_from(GROWING), operations=st.integers(1, 6))
def test_undoing_any_operations_on_any_optimizer_restores_every_bit(
    data: st.DataObject, name: str, operations: int
) -> None:
    optimizer = OPTIMIZERS[name]([parameter(2, 3), parameter(4, 2)])
    patient = Patient(optimizer, OptimizerSurgeon(optimizer), data.draw)
    patient.add()
    for number in range(data.draw(st.integers(0, 2))):
        step(optimizer, number)
    before = all_facts(optimizer)
    undos = carry_out(patient, operations)
    take_back(reversed(undos))
    assert all_facts(optimizer) == before


@given(data=st.data(), name=st.sampled_from(list(SCHEDULES)), operations=st.integers(1, 6))
def test_undoing_any_operations_under_any_schedule_restores_every_bit(
    data: st.DataObject, name: str, operations: int
) -> None:
    optimizer, scheduler = two_groups(SCHEDULES[name])
    patient = Patient(optimizer, OptimizerSurgeon(optimizer, scheduler), data.draw)
    for number in range(data.draw(st.integers(0, 12))):
        advance(optimizer, scheduler, number)
    seen = [all_facts(optimizer, scheduler)]
    undos: list[Undo] = []
    for _ in range(operations):
        done = carry_out(patient, 1)
        seen += [all_facts(optimizer, scheduler)] * len(done)
        undos += done
    while undos:
        assert all_facts(optimizer, scheduler) == seen.pop()
        undos.pop().undo()
    assert all_facts(optimizer, scheduler) == seen.pop()


@given(data=st.data(), name=st.sampled_from(GROWING), operations=st.integers(1, 5))
@settings(max_examples=60)
def test_training_goes_on_after_any_operations_and_after_undoing_any_of_them(
    data: st.DataObject, name: str, operations: int
) -> None:
    optimizer = OPTIMIZERS[name]([parameter(2, 3), parameter(4, 2)])
    patient = Patient(optimizer, OptimizerSurgeon(optimizer), data.draw)
    undos = []
    for number in range(operations):
        step(optimizer, number)
        undos += carry_out(patient, 1)
    step(optimizer, operations)
    take_back(reversed(undos[data.draw(st.integers(0, len(undos))) :]))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(optimizer.state) <= set(held)
    step(optimizer, operations + 1)
    for known in held:
        assert known.isfinite().all()
        for entry in optimizer.state.get(known, {}).values():
            assert not isinstance(entry, Tensor) or entry.isfinite().all()


@given(
    name=st.sampled_from(ELEMENTWISE),
    shapes=st.lists(st.tuples(st.integers(1, 17), st.integers(0, 9)), min_size=1, max_size=3),
    before=st.integers(0, 4),
    after=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_old_entries_of_a_widened_parameter_train_on_to_the_bit(
    name: str, shapes: list[tuple[int, int]], before: int, after: int, seed: int
) -> None:
    narrow = tuple(size for size, _ in shapes)
    wide = tuple(size + more for size, more in shapes)
    block = tuple(slice(size) for size in narrow)
    generator = torch.Generator().manual_seed(seed)
    control, old, new = (
        nn.Parameter(torch.randn(size, generator=generator)) for size in (narrow, narrow, wide)
    )
    with torch.no_grad():
        old.copy_(control)
    plain, grown = OPTIMIZERS[name]([control]), OPTIMIZERS[name]([old])
    for number in range(before + after):
        if number == before:
            with torch.no_grad():
                new[block] = old
            OptimizerSurgeon(grown).replace_parameters([(old, new)])
        trained = old if number < before else new
        gradient = torch.randn(trained.shape, generator=generator)
        sparse = isinstance(grown, torch.optim.SparseAdam)
        trained.grad = gradient.to_sparse() if sparse else gradient
        part = gradient[block].clone()
        control.grad = part.to_sparse() if sparse else part
        plain.step()
        grown.step()
    assert torch.equal(new[block], control)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD, momentum", "RMSprop, all"])
@given(more=st.integers(1, 5), before=st.integers(0, 3), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_a_hidden_layer_widened_with_zeros_takes_the_step_of_the_narrow_one(
    name: str, more: int, before: int, seed: int
) -> None:
    """Zero outgoing weights: output, loss and all gradients of old weights are what they were."""
    torch.manual_seed(seed)
    narrow, wide = mlp(4), mlp(4 + more)
    batches = torch.randn(before + 1, 8, 3, dtype=torch.float64)
    plain = OPTIMIZERS[name](list(narrow.parameters()))
    for batch in batches[:before]:
        fit(narrow, plain, batch)
    twin = mlp(4)
    twin.load_state_dict(narrow.state_dict())
    grown = OPTIMIZERS[name](list(twin.parameters()))
    saved = plain.state_dict()
    grown.load_state_dict({**saved, "state": clones(saved["state"])})
    pairs = list(zip(twin.parameters(), wide.parameters(), strict=True))
    with torch.no_grad():
        for index, (old, new) in enumerate(pairs):
            if index == 2:
                new.zero_()
            new[tuple(slice(size) for size in old.shape)] = old
    OptimizerSurgeon(grown).replace_parameters(pairs)
    losses = [fit(narrow, plain, batches[-1]), fit(wide, grown, batches[-1])]
    assume(losses[0] > 1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for old, new in zip(narrow.parameters(), wide.parameters(), strict=True):
        block = new[tuple(slice(size) for size in old.shape)]
        torch.testing.assert_close(block, old, rtol=1e-6, atol=1e-9)


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, 2)).double()


def fit(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(batch) - batch[:, :2].sin()).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def clones(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {
        index: {key: v.clone() if isinstance(v, Tensor) else v for key, v in entries.items()}
        for index, entries in state.items()
    }
