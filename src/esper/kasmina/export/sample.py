"""The example inputs that a model is exported with."""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.export.trees import leaves, map_leaves, tensors
from esper.leyline import GrowthError


@dataclass(frozen=True)
class Sample:
    """What a model is called with.

    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def sample_of(given: Any) -> Sample:  # noqa: ANN401 - checked here
    """Return a sample from one tensor, a tuple of arguments or a dict of keyword arguments.

    :raises GrowthError: it is none of these, or holds no tensor.
    """
    if isinstance(given, Sample):
        sample = given
    elif isinstance(given, Tensor):
        sample = Sample((given,))
    elif isinstance(given, tuple):
        sample = Sample(given)
    elif isinstance(given, dict):
        sample = Sample(kwargs=given)
    else:
        raise GrowthError(
            f"the sample is a {type(given).__qualname__}; give a tensor, a tuple of arguments, or "
            "a dict of keyword arguments"
        )
    if not tensors([sample.args, sample.kwargs]):
        raise GrowthError("the sample holds no tensor; give what the model is called with")
    return sample


class Inputs:
    """A sample, and which of the model's parameters each part of it goes to.

    :param model: its ``forward`` names the parameters.
    :raises GrowthError: the model does not take such arguments.
    """

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        self._model = model
        self.signature = inspect.signature(model.forward)
        try:
            bound = self.signature.bind(*sample.args, **sample.kwargs)
        except TypeError as error:
            raise GrowthError(
                f"{type(model).__name__} cannot be called with the sample: {error}"
            ) from error
        self.arguments: dict[str, Any] = dict(bound.arguments)
        # torch.export takes keyword arguments in the order given; here there is one order only.
        kwargs = {name: sample.kwargs[name] for name in self.named if name in sample.kwargs}
        self.sample = Sample(sample.args, kwargs)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Each argument by a name of its own; those of ``*args`` are numbered."""
        named: dict[str, Any] = {}
        for name, value in self.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                named.update({f"{name}_{index}": part for index, part in enumerate(value)})
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named

    @property
    def given(self) -> dict[str, Any]:
        """Arguments with tensors in them: what a saved model is called with."""
        return {name: value for name, value in self.named.items() if tensors(value)}

    @property
    def built_in(self) -> dict[str, Any]:
        """Arguments without a tensor: a saved model has these values for good."""
        return {name: value for name, value in self.named.items() if not tensors(value)}

    @property
    def batch(self) -> int | None:
        """First dimension of the first tensor that has one."""
        sizes = (t.shape[0] for t in tensors(self.named) if t.dim() and t.shape[0])
        return next(sizes, None)

    def resized(self, batch: int) -> "Inputs":
        """Return inputs of another batch size, with the same rows, repeated as needed."""
        size = self.batch
        rows = torch.arange(batch) % (size or 1)

        def resize(leaf: Any) -> Any:  # noqa: ANN401
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size:
                return leaf[rows.to(leaf.device)]
            return leaf

        sample = self.sample
        changed = Sample(map_leaves(sample.args, resize), map_leaves(sample.kwargs, resize))
        return Inputs(self._model, changed)

    def flat(self) -> list[tuple[str, Tensor]]:
        """Return all tensors with a name each, in the order of the arguments."""
        named = [pair for name, value in self.named.items() for pair in leaves(value, name)]
        return [(name, leaf) for name, leaf in named if isinstance(leaf, Tensor)]
