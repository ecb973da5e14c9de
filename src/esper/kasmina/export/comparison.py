"""What a model answers, for whatever was written of it to be compared with."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.export.calls import first_line
from esper.kasmina.export.intact import unchanged
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.trees import check_outputs, leaves
from esper.leyline import GrowthError

# Returns the outputs for inputs.
Answer = Callable[[Inputs], Any]


class Reference:
    """The outputs of a model on its sample, and on a batch of another size where it takes one.

    :param model: in evaluation mode.
    :param inputs: the sample.
    :param tolerance: largest difference of an output, over its largest magnitude.
    :ivar outputs: of the sample.
    :ivar fixed: why the model takes no batch of another size; empty where it does.
    :raises GrowthError: it cannot be called, returns what cannot be exported, or answers
        differently each time.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, tolerance: float) -> None:
        self.inputs = inputs
        self.fixed = ""
        self._name = type(model).__name__
        self._tolerance = tolerance
        try:
            # Whatever else is run begins with the model as it is now, too.
            with unchanged(model):
                self.outputs = _seeded(_calling(model), inputs)
                again = _seeded(_calling(model), inputs)
        # It is the model's own code that runs here.
        except Exception as error:
            raise GrowthError(f"{self._name} fails on the sample: {first_line(error)}") from error
        check_outputs(self.outputs)
        try:
            _compare(self.outputs, again, tolerance, "a second call")
        except GrowthError as error:
            raise GrowthError(
                f"{self._name} answers differently each time ({error}); what it keeps from one "
                "call for the next cannot be exported"
            ) from error
        self._other = self._ask_for_another_size(model)

    @property
    def dynamic(self) -> bool:
        """Whether the model takes batches of another size."""
        return self._other is not None

    def check(self, answer: Answer, *, dynamic: bool, what: str) -> float:
        """Compare answers with the model's own.

        :param answer: gives outputs for inputs.
        :param dynamic: whether to try a batch of another size as well.
        :param what: is compared; named in the error.
        :returns: the largest absolute difference on the sample.
        :raises GrowthError: they differ.
        """
        pairs = [(self.inputs, self.outputs)]
        if dynamic and self._other is not None:
            pairs.append(self._other)
        worst = []
        for inputs, outputs in pairs:
            with_batch = what if inputs is self.inputs else f"{what} with a batch of {inputs.batch}"
            try:
                found = _seeded(answer, inputs)
            # What was written fails in as many ways as there are forms.
            except Exception as error:
                raise GrowthError(f"{with_batch} fails: {first_line(error)}") from error
            worst.append(_compare(outputs, found, self._tolerance, with_batch))
        return worst[0]

    def _ask_for_another_size(self, model: nn.Module) -> tuple[Inputs, Any] | None:
        size = self.inputs.batch
        if size is None:
            self.fixed = "no input has a batch"
            return None
        try:
            inputs = self.inputs.resized(size + 1)
            with unchanged(model):
                return inputs, _seeded(_calling(model), inputs)
        # A model that takes one size only is as good as any other.
        except Exception as error:  # noqa: BLE001
            self.fixed = f"{self._name} takes no batch of {size + 1}: {first_line(error)}"
            return None


def _calling(model: nn.Module) -> Answer:
    return lambda inputs: model(*inputs.sample.args, **inputs.sample.kwargs)


def _seeded(answer: Answer, inputs: Inputs) -> Any:  # noqa: ANN401
    """Return the outputs, always with the same random numbers."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return answer(inputs)


def _compare(expected: Any, found: Any, tolerance: float, what: str) -> float:  # noqa: ANN401
    wanted, given = list(leaves(expected, "output")), list(leaves(found, "output"))
    if [name for name, _ in wanted] != [name for name, _ in given]:
        raise GrowthError(
            f"{what} gives {[name for name, _ in given]}, the model {[name for name, _ in wanted]}"
        )
    worst = 0.0
    for (name, first), (_, second) in zip(wanted, given, strict=True):
        if not isinstance(first, Tensor):
            if first != second:
                raise GrowthError(f"{name} of {what} is {second!r}, of the model {first!r}")
            continue
        difference, relative = _difference(first, second, f"{name} of {what}")
        if not relative <= tolerance:
            raise GrowthError(
                f"{name} of {what} differs from the model's by {difference:.3g}, relative "
                f"{relative:.3g}; the tolerance is {tolerance:g}"
            )
        worst = max(worst, difference)
    return worst


def _difference(first: Tensor, second: Any, what: str) -> tuple[float, float]:  # noqa: ANN401
    """Return the largest difference, and what it is over the largest magnitude."""
    if not isinstance(second, Tensor) or first.shape != second.shape:
        shape = tuple(second.shape) if isinstance(second, Tensor) else type(second).__qualname__
        raise GrowthError(f"{what} is {shape}, of the model {tuple(first.shape)}")
    if first.dtype != second.dtype:
        raise GrowthError(f"{what} is {second.dtype}, of the model {first.dtype}")
    if torch.equal(first, second) or not first.numel():
        return 0.0, 0.0
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.detach().to(wide), second.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs())
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    worst = float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max())
    return worst, worst / largest if largest else worst
