"""Training data in an order that can be resumed, with an identity for every batch."""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from esper.leyline import DataError
from esper.tolaria.fetch import BatchKey, KeyedDataset, fetcher

_SEED_STRIDE = 1_000_003


class Batch(NamedTuple):
    """One batch and its identity, which is the same in every run with the same seed.

    :param content: what the collate function returned.
    :param epoch: epoch, from 0.
    :param number: position in the epoch, from 0; skipped batches count.
    :param samples: indices into the data set.
    """

    content: Any
    epoch: int
    number: int
    samples: list[int]


@dataclass(frozen=True)
class DataPlan:
    """How samples become batches.

    :param dataset: map-style data set.
    :param batch_size: samples in a batch.
    :param shuffle: draw a new permutation each epoch, from the seed and the epoch.
    :param drop_last: leave out a last batch that is not full.
    :param collate: makes a batch from a list of samples.
    :param worker_options: arguments for torch's DataLoader when it has to fetch.
    """

    dataset: Dataset[Any]
    batch_size: int
    shuffle: bool
    drop_last: bool
    collate: Callable[[list[Any]], Any]
    worker_options: dict[str, Any]

    @property
    def samples(self) -> int:
        """Number of samples in the data set."""
        return len(cast("Sized", self.dataset))

    @property
    def batches(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)


def plan_data(source: object, *, batch_size: int, shuffle: bool, role: str) -> DataPlan:
    """Read a plan off a data set or off an ordinary DataLoader.

    :param source: a map-style ``Dataset``, or a ``DataLoader`` over one that shuffles or not.
    :param batch_size: used when ``source`` is a data set.
    :param shuffle: used when ``source`` is a data set.
    :param role: what the data is for; named in errors.
    :raises DataError: the source is of another kind, is empty, or its order is not ours to resume.
    """
    if isinstance(source, DataLoader):
        plan = _plan_loader(source, role)
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        dataset = cast("Dataset[Any]", source)
        plan = DataPlan(dataset, batch_size, shuffle, False, default_collate, {})
    else:
        raise DataError(
            f"the {role} data is a {type(source).__qualname__}; give a map-style Dataset "
            "(with __getitem__ and __len__) or a DataLoader over one"
        )
    if plan.batches == 0:
        raise DataError(
            f"the {role} data has {plan.samples} samples, which make no batch of "
            f"{plan.batch_size}; give it samples, or a smaller batch size"
        )
    return plan


def _plan_loader(loader: DataLoader[Any], role: str) -> DataPlan:
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            f"the {role} DataLoader reads an IterableDataset, whose order cannot be resumed; "
            "use a map-style Dataset"
        )
    sampler = loader.sampler
    shuffles = type(sampler) is RandomSampler and not sampler.replacement
    plain = type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None
    if not plain or not (shuffles or type(sampler) is SequentialSampler):
        odd = sampler if plain else loader.batch_sampler
        raise DataError(
            f"the {role} DataLoader draws with {type(odd).__qualname__}, whose order cannot be "
            "resumed; pass shuffle=True or shuffle=False instead, or order the data set itself"
        )
    options = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    needed = loader.num_workers > 0 or loader.pin_memory
    return DataPlan(
        dataset=loader.dataset,
        batch_size=cast("int", loader.batch_size),
        shuffle=shuffles,
        drop_last=loader.drop_last,
        collate=loader.collate_fn,
        worker_options=options if needed else {},
    )


class ResumableLoader:
    """Iterates over all epochs of a data plan, from any position, leaving out skipped batches.

    The order of an epoch is a function of the seed and the epoch alone, so that two integers say
    where training stands, also in the middle of an epoch and with worker processes.

    :param plan: see :func:`plan_data`.
    :param seed: of the data order.
    :param epochs: how many; iteration stops after the last.
    """

    def __init__(self, plan: DataPlan, *, seed: int, epochs: int) -> None:
        self.plan = plan
        self.epochs = epochs
        self.epoch = 0
        self.skipped: set[tuple[int, int]] = set()
        self._seed = seed
        self._index = 0
        self._keys: list[BatchKey] = []
        self._fetched: Iterator[Any] | None = None
        self._fetch = fetcher(plan.dataset, plan.collate)
        self._loader = self._worker_loader() if plan.worker_options else None

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> Batch:
        if self._fetched is None:
            self._open()
        while not self._keys:
            self.start_next_epoch()
            self._open()
        key = self._keys.pop()
        if self._loader is None:
            content = self._fetch(key.samples)
        else:
            content = next(cast("Iterator[Any]", self._fetched))
        self._index = key.number + 1
        return Batch(content, key.epoch, key.number, key.samples)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and index of the next batch."""
        return self.epoch, self._index

    @property
    def epoch_ended(self) -> bool:
        """Whether the current epoch has begun and has no batch left."""
        return self._fetched is not None and not self._keys

    def start_next_epoch(self) -> None:
        """Move to the first batch of the next epoch."""
        self._move(self.epoch + 1, 0)

    def skip(self, epoch: int, index: int) -> None:
        """Leave a batch out from the next repositioning on."""
        self.skipped.add((epoch, index))

    def samples_of(self, epoch: int, index: int) -> list[int]:
        """Return the sample indices of any batch, past or to come."""
        size = self.plan.batch_size
        return self._order(epoch)[index * size : (index + 1) * size]

    def state_dict(self) -> dict[str, Any]:
        """Return the position; a skipped batch is part of it."""
        return {
            "epoch": self.epoch,
            "index": self._index,
            "skipped": sorted([epoch, index] for epoch, index in self.skipped),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Move to a saved position. Skips add up: one that is known stays."""
        self.skipped.update((epoch, index) for epoch, index in state_dict["skipped"])
        self._move(state_dict["epoch"], state_dict["index"])

    def _move(self, epoch: int, index: int) -> None:
        self.epoch, self._index = epoch, index
        self._keys = []
        self._fetched = None

    def _open(self) -> None:
        if self.epoch >= self.epochs:
            raise StopIteration
        order = self._order(self.epoch)
        size = self.plan.batch_size
        self._keys = [
            BatchKey(self._seed, self.epoch, index, order[index * size : (index + 1) * size])
            for index in range(self.plan.batches - 1, self._index - 1, -1)
            if (self.epoch, index) not in self.skipped
        ]
        self._fetched = iter(()) if self._loader is None else iter(self._loader)

    def _order(self, epoch: int) -> list[int]:
        if not self.plan.shuffle:
            return list(range(self.plan.samples))
        generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + epoch)
        return cast("list[int]", torch.randperm(self.plan.samples, generator=generator).tolist())

    def _worker_loader(self) -> DataLoader[Any]:
        return DataLoader(
            cast("Dataset[Any]", KeyedDataset(self.plan.dataset)),
            batch_sampler=cast("Any", _Keys(self)),
            collate_fn=self.plan.collate,
            # The loader draws a seed for its workers from here, not from the global generator.
            generator=torch.Generator().manual_seed(self._seed),
            **self.plan.worker_options,
        )


class _Keys:
    """The batch sampler of the worker loader: what is left of the epoch."""

    def __init__(self, loader: ResumableLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[BatchKey]:
        return reversed(list(self._loader._keys))

    def __len__(self) -> int:
        return self._loader.plan.batches
