from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from esper.leyline import DataError
from esper.tolaria.data import Batch, ResumableLoader, plan_data


class Squares(Dataset[Any]):
    """A data set without tensors of its own; each sample draws a random number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index * index, torch.rand(1)


def loader(
    source: object, *, epochs: int = 2, seed: int = 3, batch_size: int = 4
) -> ResumableLoader:
    plan = plan_data(source, batch_size=batch_size, shuffle=True, role="training")
    return ResumableLoader(plan, seed=seed, epochs=epochs)


def identities(batches: list[Batch]) -> list[tuple[int, int, list[int]]]:
    return [(batch.epoch, batch.number, batch.samples) for batch in batches]


@given(size=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_sample_once(size: int, batch_size: int, seed: int) -> None:
    batches = list(loader(Squares(size), seed=seed, batch_size=batch_size))
    for epoch in range(2):
        samples = [s for batch in batches if batch.epoch == epoch for s in batch.samples]
        assert sorted(samples) == list(range(size))


@given(size=st.integers(1, 40), batch_size=st.integers(1, 9), cut=st.integers(0, 30))
def test_any_position_can_be_resumed(size: int, batch_size: int, cut: int) -> None:
    whole = identities(list(loader(Squares(size), batch_size=batch_size)))
    first = loader(Squares(size), batch_size=batch_size)
    cut = min(cut, len(whole))
    for _ in range(cut):
        next(first)
    second = loader(Squares(size), batch_size=batch_size)
    second.load_state_dict(first.state_dict())
    assert identities(list(second)) == whole[cut:]


def test_epochs_differ_and_seeds_differ() -> None:
    batches = list(loader(Squares(50), batch_size=50))
    assert batches[0].samples != batches[1].samples
    assert batches[0].samples != next(loader(Squares(50), batch_size=50, seed=4)).samples


def test_skipped_batches_are_left_out_and_keep_their_numbers() -> None:
    data = loader(Squares(12), epochs=1)
    data.skip(0, 1)
    assert [batch.number for batch in data] == [0, 2]
    assert data.state_dict()["skipped"] == [[0, 1]]


def test_an_epoch_of_which_all_batches_are_skipped_ends() -> None:
    data = loader(Squares(8))
    data.skip(0, 1)
    next(data)
    assert data.epoch_ended
    assert next(data).epoch == 1


def test_samples_of_a_past_batch_are_known() -> None:
    data = loader(Squares(20))
    batches = list(data)
    assert all(data.samples_of(b.epoch, b.number) == b.samples for b in batches)


def test_gathering_tensors_equals_collating_samples() -> None:
    dataset = TensorDataset(torch.randn(10, 3), torch.arange(10))
    gathered = next(loader(dataset)).content
    collated = torch.utils.data.default_collate([dataset[i] for i in next(loader(dataset)).samples])
    assert all(torch.equal(a, b) for a, b in zip(gathered, collated, strict=True))


@pytest.mark.timeout(60)
def test_workers_give_the_same_batches_whatever_the_position() -> None:
    source = DataLoader(Squares(24), batch_size=4, shuffle=True, num_workers=2)
    whole = [(b.content[0].tolist(), b.content[1].tolist()) for b in loader(source, epochs=1)]
    first = loader(source, epochs=1)
    for _ in range(2):
        next(first)
    second = loader(source, epochs=1)
    second.load_state_dict(first.state_dict())
    rest = [(b.content[0].tolist(), b.content[1].tolist()) for b in second]
    assert rest == whole[2:]
    assert whole[0][0] == [i * i for i in next(loader(Squares(24), epochs=1)).samples]


def test_iterating_draws_nothing_from_the_global_generator() -> None:
    dataset = TensorDataset(torch.arange(10))
    before = torch.get_rng_state()
    list(loader(DataLoader(dataset, shuffle=True, batch_size=5)))
    assert torch.equal(before, torch.get_rng_state())


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TensorDataset(torch.empty(0, 2)), "0 samples"),
        (DataLoader(TensorDataset(torch.arange(3)), batch_size=8, drop_last=True), "no batch of 8"),
        ([].__iter__(), "map-style"),
        (DataLoader(Stream()), "IterableDataset"),
        (
            DataLoader(Squares(4), sampler=WeightedRandomSampler([1.0] * 4, 4)),
            "WeightedRandomSampler",
        ),
    ],
)
def test_data_that_cannot_be_resumed_is_refused_by_name(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_data(source, batch_size=4, shuffle=True, role="training")
