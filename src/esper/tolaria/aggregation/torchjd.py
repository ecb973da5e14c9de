"""Every Gramian weighting of the torchjd package as an aggregator."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class TorchJDWeighting:
    """Adapts a weighting of torchjd: UPGrad, MGDA, CAGrad, Aligned-MTL, Nash-MTL and others.

    >>> from torchjd.aggregation import UPGradWeighting  # pip install esper[torchjd]
    >>> TorchJDWeighting(UPGradWeighting()).weights(torch.eye(2).double()).tolist()
    [0.5, 0.5]

    Some weightings compare against absolute thresholds; with ``normalise`` the Gramian is divided
    by its mean diagonal first, so that small gradients are not taken for zero.

    :param weighting: called with the Gramian, n by n, positive semi-definite; returns n weights.
    :param normalise: whether to bring the Gramian to scale 1 first. Leave it off for weightings
        whose result depends on the scale by design, such as Nash-MTL's and FairGrad's.
    """

    def __init__(
        self, weighting: Callable[[Tensor], Tensor] | nn.Module, *, normalise: bool = False
    ) -> None:
        if not callable(weighting):
            raise RuntimeError(
                f"weighting is a {type(weighting).__qualname__}; give a weighting such as "
                "torchjd.aggregation.UPGradWeighting()"
            )
        self._weighting = weighting
        self._normalise = normalise
        self._tasks = 0

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weighting's answer.

        :raises RuntimeError: the answer is not one weight for each task.
        """
        if self._normalise:
            scale = gramian.diagonal().mean()
            gramian = torch.where(scale > 0, gramian / scale, gramian)
        weights = self._ask(gramian)
        if not isinstance(weights, Tensor) or weights.shape != gramian.shape[:1]:
            shape = getattr(weights, "shape", type(weights).__qualname__)
            raise RuntimeError(
                f"the weighting returned {shape} for {len(gramian)} tasks; give a Gramian "
                "weighting, not an aggregator of whole gradients"
            )
        return weights.to(gramian)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of what the weighting itself would save, and for how many tasks."""
        state = self._weighting.state_dict() if isinstance(self._weighting, nn.Module) else {}
        return {"tasks": self._tasks, "weighting": deepcopy(dict(state))}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set what :meth:`state_dict` returned."""
        self._tasks = state_dict["tasks"]
        if self._tasks and isinstance(self._weighting, nn.Module):
            # Stateful weightings make room for their state when they are first asked.
            with torch.random.fork_rng(devices=[]):
                self._ask(torch.eye(self._tasks, dtype=torch.float64))
            self._weighting.load_state_dict(state_dict["weighting"])

    def _ask(self, gramian: Tensor) -> Any:  # noqa: ANN401 - checked by the caller
        self._tasks = len(gramian)
        with torch.no_grad():
            return self._weighting(gramian)
