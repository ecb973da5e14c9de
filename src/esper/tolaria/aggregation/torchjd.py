"""Every Gramian weighting of the torchjd package as an aggregator."""

from collections.abc import Callable
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

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weighting's answer.

        :raises RuntimeError: the answer is not one weight for each task.
        """
        if self._normalise:
            scale = gramian.diagonal().mean()
            gramian = torch.where(scale > 0, gramian / scale, gramian)
        with torch.no_grad():
            weights: Any = self._weighting(gramian)
        if not isinstance(weights, Tensor) or weights.shape != gramian.shape[:1]:
            shape = getattr(weights, "shape", type(weights).__qualname__)
            raise RuntimeError(
                f"the weighting returned {shape} for {len(gramian)} tasks; give a Gramian "
                "weighting, not an aggregator of whole gradients"
            )
        return weights.to(gramian)

    def state_dict(self) -> dict[str, Any]:
        """Return what the weighting itself would save."""
        if isinstance(self._weighting, nn.Module):
            return dict(self._weighting.state_dict())
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set what :meth:`state_dict` returned."""
        if isinstance(self._weighting, nn.Module):
            self._weighting.load_state_dict(state_dict)
