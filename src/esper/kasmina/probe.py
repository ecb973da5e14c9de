"""Running a model on a sample without leaving a trace, to see what its modules do."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Sample = Tensor | Sequence[Any] | Mapping[str, Any]


class Probe:
    """Runs a model on a kept sample.

    :param model: any module.
    :param sample: its input: a tensor, a sequence of positional arguments, or a mapping of named
        ones; tensors of any shape, moved to the model's device.
    """

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        self.model = model
        self._sample = sample

    def run(self) -> Any:  # noqa: ANN401 - the user's output
        """Run the model once, as it is."""
        first = next(self.model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        placed: Any = tree_map(lambda leaf: _place(leaf, device), self._sample)
        if isinstance(placed, Tensor):
            return self.model(placed)
        return self.model(**placed) if isinstance(placed, Mapping) else self.model(*placed)

    def outputs(self) -> list[Tensor]:
        """Return the tensors of the output in evaluation mode; nothing of the model changes."""
        with quietly(self.model, training=False):
            return [leaf.clone() for leaf in tree_leaves(self.run()) if isinstance(leaf, Tensor)]


@dataclass
class Sighting:
    """What a module did in one run of the model.

    :ivar calls: how often it was called.
    :ivar inputs: positional arguments of the last call.
    :ivar output: of the last call.
    """

    calls: int = 0
    inputs: tuple[Any, ...] = ()
    output: Any = None


def watch(probe: Probe, module: nn.Module, *, training: bool) -> Sighting:
    """Run the model once and return what one of its modules did."""
    sighting, forward = Sighting(), module.forward

    def see(*inputs: Any, **named: Any) -> Any:  # noqa: ANN401
        sighting.calls += 1
        sighting.inputs = (*inputs, *named.values())
        sighting.output = forward(*inputs, **named)
        return sighting.output

    # Not a hook: some modules leave their fused path when they see one, and only then call this.
    vars(module)["forward"] = see
    try:
        with quietly(probe.model, training=training):
            probe.run()
    finally:
        del vars(module)["forward"]
    return sighting


@contextmanager
def quietly(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run the model eagerly and without gradients; put buffers, modes and random streams back."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), kept_random(), torch.compiler.set_stance("force_eager"):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def kept_random() -> Iterator[None]:
    """Put the random streams of Python, NumPy, torch and its devices back afterwards."""
    python, numpy, streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(streams)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest value of the first.

    :returns: infinity where they do not have the same shapes, or one is not finite.
    """
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    largest, scale = 0.0, 1e-30
    for one, other in zip(before, after, strict=True):
        if one.numel():
            largest = max(largest, float((one.double() - other.double()).abs().max()))
            scale = max(scale, float(one.double().abs().max()))
    return largest / scale if largest == largest else float("inf")


def equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether two outputs are the same to the bit."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


def _place(leaf: Any, device: torch.device) -> Any:  # noqa: ANN401 - any leaf of the sample
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
