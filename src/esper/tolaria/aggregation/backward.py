"""One gradient for each task, combined into ``.grad``: what replaces ``loss.backward()``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator
from esper.tolaria.aggregation.combination import Combination, LossScale
from esper.tolaria.aggregation.gradients import TaskGradients
from esper.tolaria.aggregation.groups import Groups
from esper.tolaria.aggregation.pull import EXACT, MODES, Mode, at_features
from esper.tolaria.aggregation.refreshed import Refreshed
from esper.tolaria.aggregation.report import ConflictReport

NOTHING = "no gradients available for aggregation"


def backward(
    losses: Mapping[str, Tensor | None],
    parameters: Iterable[Tensor],
    aggregator: Aggregator,
    *,
    mode: Mode = "sequential",
    groups: Groups | None = None,
    heads: Iterable[Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> ConflictReport:
    """Compute each task's gradient and accumulate their aggregation into ``.grad``.

    A parameter that only one task reaches, such as a head's, gets that task's gradient as it is;
    one that no task reaches keeps its ``.grad``. The aggregator sees the other parameters only.
    All losses come from one forward pass: dropout masks and batch statistics are those of all
    tasks alike.

    Modes, by what they cost (one pass: through the trunk, backwards) and by their error:

    - ``sequential``: exact; one pass for each task. Works wherever autograd does.
    - ``factored``: exact but for rounding; one pass for each task, without the weight gradients of
      layers that are wider than the batch is long: linear ones, convolutions over small images,
      embeddings.
    - ``batched``: exact but for rounding; one vectorised pass. Needs operators that can be
      vectorised: no compiled model, no activation checkpointing.
    - ``batched-factored``: both.
    - ``features``: one pass. The Gramian is that of the gradients at the shared representation, an
      upper bound that ignores what the trunk does to them (MGDA-UB, arXiv 1810.04650).

    Which is fastest depends on the model: :func:`measure_modes` tells.

    With :class:`Refreshed` as the aggregator, calls in between take one pass in any exact mode.

    :param losses: one scalar for each task, by name; None for a task that is absent from the batch.
    :param parameters: leaf tensors; those that require no gradient are left alone.
    :param aggregator: turns the Gramian into weights.
    :param mode: see above.
    :param groups: parts of the model with a Gramian and weights of their own; see
        :func:`by_layer` and :func:`by_name`.
    :param heads: the parameters that are kept out of the projection and get the plain sum of their
        gradients, in place of those that one task alone reaches; ``()`` projects all. A model
        compiled as a whole needs this: it returns zeros where a task does not reach.
    :param scaler: scales every loss alike. The gradients stay scaled, for the scaler to unscale
        and judge; the report is unscaled.
    :raises RuntimeError: there is no loss; a loss is no scalar or carries no gradient; a gradient
        is sparse; groups don't cover the parameters; mode and options don't go together.
    """
    present, absent = present_losses(losses)
    _check(mode, aggregator, groups, heads)
    scale = LossScale.of(scaler, present)
    scaled = scale.apply(present)
    parameters = trainable(parameters)
    combination = Combination(parameters, aggregator, scale, *_parts(parameters, groups, heads))
    if mode == "features":
        report = combination.at_features(at_features(scaled, parameters))
    elif isinstance(aggregator, Refreshed):
        pull = partial(EXACT[mode], scaled, parameters)
        report = combination.refreshed(aggregator, at_features(scaled, parameters), pull)
    else:
        report = combination.of(EXACT[mode](scaled, parameters))
    return replace(report, mode=mode, absent=absent)


class MicroBatches:
    """Accumulates each task's gradient over micro-batches, and combines them once.

    Calling :func:`backward` on each micro-batch adds up updates that were each projected on their
    own; this projects the gradients of the whole batch. It holds one gradient for each task.

    :param parameters: as for :func:`backward`, like the rest.
    :param mode: ``sequential`` or ``batched``; factors of many micro-batches would be no smaller
        than the gradients.
    :raises RuntimeError: another mode, or a refreshed aggregator.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        aggregator: Aggregator,
        *,
        mode: Mode = "sequential",
        groups: Groups | None = None,
        heads: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if mode not in ("sequential", "batched") or isinstance(aggregator, Refreshed):
            raise RuntimeError(
                "micro-batches accumulate whole gradients of each task, which other modes than "
                "'sequential' and 'batched' and refreshed aggregators do without; call backward "
                "for each micro-batch"
            )
        _check(mode, aggregator, groups, heads)
        kept = trainable(parameters)
        self._combination = Combination(kept, aggregator, LossScale(), *_parts(kept, groups, heads))
        self._mode: Mode = mode
        self._scaler = scaler
        self._gradients: TaskGradients | None = None
        self._named: dict[str, None] = {}

    def add(self, losses: Mapping[str, Tensor | None]) -> None:
        """Add the gradients of one micro-batch.

        For the mean over the whole batch, divide the losses by the number of micro-batches.
        """
        present, _ = present_losses(losses)
        self._named.update(dict.fromkeys(losses))
        scale = LossScale.of(self._scaler, present)
        self._combination = replace(self._combination, scale=scale)
        gradients = EXACT[self._mode](scale.apply(present), self._combination.parameters)
        if self._gradients is None:
            self._gradients = gradients
        else:
            self._gradients.extend(gradients)

    def finish(self) -> ConflictReport:
        """Combine what was added into ``.grad``, and begin anew.

        :raises RuntimeError: nothing was added.
        """
        if self._gradients is None:
            raise RuntimeError(NOTHING)
        report = self._combination.of(self._gradients)
        absent = tuple(task for task in self._named if task not in self._gradients.rows)
        self._gradients, self._named = None, {}
        return replace(report, mode=self._mode, absent=absent)


def trainable(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return those that require a gradient, each once.

    :raises RuntimeError: something is no tensor, or a tensor that is no leaf.
    """
    kept: dict[int, Tensor] = {}
    for place, parameter in enumerate(parameters):
        if not _is_tensor(parameter) or not parameter.is_leaf:
            kind = type(parameter).__qualname__
            raise RuntimeError(
                f"parameter {place} is a {kind} and no leaf tensor; give those of "
                "model.parameters()"
            )
        if parameter.requires_grad:
            kept[id(parameter)] = parameter
    return list(kept.values())


def _parts(
    parameters: Sequence[Tensor],
    groups: Groups | None,
    heads: Iterable[Tensor] | None,
) -> tuple[Groups | None, Sequence[Tensor] | None]:
    """Return groups and heads as lists, which can be gone through again.

    :raises RuntimeError: a head is not among the parameters.
    """
    listed = None if groups is None else {name: list(members) for name, members in groups.items()}
    if heads is None:
        return listed, None
    known = {id(parameter) for parameter in parameters}
    kept = list(heads)
    for place, head in enumerate(kept):
        if not _is_tensor(head) or (head.requires_grad and id(head) not in known):
            raise RuntimeError(f"head {place} is not among the parameters; give their tensors")
    return listed, kept


def present_losses(
    losses: Mapping[str, Tensor | None],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Split losses into those there are and the names of the absent.

    :raises RuntimeError: there is none, or one is no scalar or carries no gradient.
    """
    if not hasattr(losses, "items"):
        raise RuntimeError(
            f"losses are a {type(losses).__qualname__}; give a dict of scalars by task"
        )
    present = {task: loss for task, loss in losses.items() if loss is not None}
    for task, loss in present.items():
        problem = _problem(loss)
        if problem is not None:
            raise RuntimeError(f"the loss of task {task!r} {problem}")
    if not present:
        raise RuntimeError(NOTHING)
    return present, tuple(task for task, loss in losses.items() if loss is None)


def _problem(loss: Tensor) -> str | None:
    if not _is_tensor(loss):
        return f"is a {type(loss).__qualname__}; give a scalar tensor"
    if loss.numel() != 1:
        return f"has shape {tuple(loss.shape)}; reduce it to a scalar"
    if not loss.requires_grad:
        return (
            "carries no gradient; compute it from the model's output without detach(), or give "
            "None for a task that is absent"
        )
    return None


def _check(
    mode: str, aggregator: Aggregator, groups: Groups | None, heads: Iterable[Tensor] | None
) -> None:
    if mode not in MODES:
        raise RuntimeError(f"mode is {mode!r}; give one of {', '.join(MODES)}")
    one_pass = mode == "features" or isinstance(aggregator, Refreshed)
    if one_pass and (groups is not None or heads is not None):
        raise RuntimeError(
            "mode 'features' and refreshed aggregators go through the trunk once, with one set of "
            "weights; leave out groups and heads, or choose another mode"
        )
    if mode == "features" and isinstance(aggregator, Refreshed):
        raise RuntimeError(
            "mode 'features' goes through the trunk once at every call; give it the aggregator "
            "itself in place of a refreshed one"
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
