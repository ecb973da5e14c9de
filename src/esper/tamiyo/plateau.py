"""A policy of one rule: when the loss stops falling, cut the learning rate."""

import math
from typing import Any

from esper.leyline import ConfigError, ScaleLearningRate, SystemState


class PlateauPolicy:
    """Cuts the learning rate after some epochs without improvement of the training loss.

    Validation metrics are not looked at: which of them are better when higher is not known here.

    :param patience: epochs without improvement that are waited for.
    :param factor: multiplier of the learning rate, between 0 and 1.
    :param threshold: smallest improvement that counts, as a share of the best loss.
    :raises ConfigError: a parameter is out of range.
    """

    # A few comparisons: sure to return.
    isolation = "thread"

    def __init__(self, *, patience: int = 3, factor: float = 0.5, threshold: float = 0.01) -> None:
        if patience < 1:
            raise ConfigError(f"patience is {patience}; give 1 epoch or more")
        if not 0 < factor < 1:
            raise ConfigError(f"factor is {factor}; give a number between 0 and 1")
        self._patience = patience
        self._factor = factor
        self._threshold = threshold
        self._best = math.inf
        self._waited = 0

    def decide(self, state: SystemState) -> ScaleLearningRate | None:
        """Answer with a cut when the patience is spent."""
        loss = sum(state.losses.values())
        if loss < self._best - self._threshold * abs(self._best) or math.isinf(self._best):
            self._best, self._waited = loss, 0
            return None
        self._waited += 1
        if self._waited < self._patience:
            return None
        self._waited = 0
        return ScaleLearningRate(self._factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss and the epochs waited."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._best = state_dict["best"]
        self._waited = state_dict["waited"]
