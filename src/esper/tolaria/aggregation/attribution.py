"""Losses by task from one forward pass over a batch of mixed samples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def losses_by_task(
    sample_losses: Tensor, ids: Tensor, tasks: Sequence[str] | Mapping[str, int]
) -> dict[str, Tensor | None]:
    """Attribute the loss of each sample to the task, or seed, that it belongs to.

    A data loader yields with each sample the number of its task; the loss function is called with
    ``reduction="none"``. :func:`~esper.tolaria.aggregation.backward` drops absent tasks and names
    them in its report.

    A model that computes every head for every sample and picks one makes each task reach each
    head, with zeros. Name the heads to ``backward`` to keep them out of the projection.

    :param sample_losses: one loss for each sample, batch.
    :param ids: the task of each sample, integers, batch.
    :param tasks: names of the tasks in the order of their numbers, or their numbers by name.
    :returns: the mean loss over the samples of each task; None for a task without samples.
    :raises RuntimeError: shapes differ, ids are no integers, or a sample belongs to no task.
    """
    numbers = tasks if isinstance(tasks, Mapping) else {t: n for n, t in enumerate(tasks)}
    _check(sample_losses, ids, numbers)
    members = {task: ids == number for task, number in numbers.items()}
    # Which tasks are present decides the shape of all that follows, so that it has to be read here.
    counts: list[int] = torch.stack([member.sum() for member in members.values()]).tolist()
    if sum(counts) != len(ids):
        unknown = sorted(set(ids.tolist()) - set(numbers.values()))
        raise RuntimeError(f"samples belong to tasks {unknown}; known are {dict(numbers)}")
    return {
        task: sample_losses[member].mean() if count else None
        for (task, member), count in zip(members.items(), counts, strict=True)
    }


def _check(sample_losses: Tensor, ids: Tensor, numbers: Mapping[str, int]) -> None:
    if sample_losses.dim() != 1 or ids.shape != sample_losses.shape:
        raise RuntimeError(
            f"sample_losses has shape {tuple(sample_losses.shape)} and ids {tuple(ids.shape)}; "
            "give both one number for each sample (a loss with reduction='none')"
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise RuntimeError(f"ids are {ids.dtype}; give integers")
    if not numbers or len(set(numbers.values())) < len(numbers):
        raise RuntimeError(f"tasks are {dict(numbers)}; give at least one, each its own number")
