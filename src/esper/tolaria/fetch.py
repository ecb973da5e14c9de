"""Fetching the samples of a batch, in this process or in a worker process."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate, get_worker_info


class BatchKey(NamedTuple):
    """What names a batch before it is fetched."""

    seed: int
    epoch: int
    number: int
    samples: list[int]


def fetcher(
    dataset: Dataset[Any], collate: Callable[[list[Any]], Any]
) -> Callable[[list[int]], Any]:
    """Return a function from sample indices to a collated batch, for fetching in this process.

    Plain tensors are gathered with one index operation each, which gives the same batch as
    collating them sample by sample.
    """
    if type(dataset) is TensorDataset and collate is default_collate:
        tensors = dataset.tensors

        def gather(samples: list[int]) -> list[torch.Tensor]:
            index = torch.tensor(samples)
            return [tensor[index] for tensor in tensors]

        return gather
    many = getattr(dataset, "__getitems__", None)
    if many is not None:
        return lambda samples: collate(many(samples))
    one = dataset.__getitem__
    return lambda samples: collate([one(sample) for sample in samples])


class KeyedDataset:
    """A data set asked for whole batches by key.

    In a worker process the generators are seeded from the key first: a random augmentation then
    depends on the batch alone, and not on which worker fetches it or what it fetched before.

    :param dataset: a map-style data set.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, key: BatchKey) -> list[Any]:
        """Return the samples of one batch."""
        if get_worker_info() is not None:
            _seed_generators(key)
        many = getattr(self._dataset, "__getitems__", None)
        if many is not None:
            samples: list[Any] = many(key.samples)
            return samples
        return [self._dataset[sample] for sample in key.samples]

    def __getitem__(self, index: int) -> object:
        """Return one sample."""
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # planned data sets have a length


def _seed_generators(key: BatchKey) -> None:
    sequence = np.random.SeedSequence([key.seed, key.epoch, key.number])
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)
